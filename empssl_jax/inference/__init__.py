"""Uses trained encoders: from Python, on folders of image files, and in PyTorch.

image_encoder.py defines what `empssl_jax.load` returns; embed_files.py applies it to folders. weights.py exports and
imports files for PyTorch, with the array names of torch_names.py. May import every subpackage except `report`.
"""
