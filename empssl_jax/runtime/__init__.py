"""The machine: devices, processes, signals, caches, progress bars. Nothing here knows the method.

devices.py has the mesh and the ways to it and back; distributed.py joins several processes, interruption.py stops them
between two steps. The other files are independent of each other. Imports only `config`.
"""
