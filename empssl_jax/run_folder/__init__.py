"""The folder of a run: files that training writes, and that resumption and evaluation read.

workdir.py locks the folder. saved_config.py, checkpoints.py (with digests.py), results.py and step_files.py each own
the files that they are named after. metrics.py writes the metrics of each step, and loggers.py sends them to
TensorBoard and Weights & Biases. Imports only `config` and `runtime`.
"""
