"""The folder of a run: what is written while it trains, and read when it resumes or is measured.

workdir.py locks the folder. saved_config.py, checkpoints.py (with digests.py), results.py and step_files.py each own
the files that they are named after; metrics.py writes what a step reports, and loggers.py sends it elsewhere. Imports
only `config` and `runtime`.
"""
