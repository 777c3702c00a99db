"""Trained encoders in use: from Python, for folders of files, and in PyTorch.

image_encoder.py is what `empssl_jax.load` returns; embed_files.py applies it to folders. weights.py writes and reads
files for PyTorch, with the names of torch_names.py. May import every room but `report` and `training`.
"""
