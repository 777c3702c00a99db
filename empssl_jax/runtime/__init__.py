"""The machine: devices, processes, signals, caches, locks, progress bars. Nothing here knows the method.

devices.py has the mesh and copies arrays to and from its devices. distributed.py joins several processes, and
interruption.py stops them between two steps. The other files are independent of each other. Imports only `config`.
"""
