"""Uses trained encoders: from Python, on folders of image files, in PyTorch, and as ONNX programs.

image_encoder.py defines what `empssl_jax.load` returns; embed_files.py applies it to folders. export_weights.py and
import_weights.py write and read files for PyTorch, with the array names of torch_names.py; onnx_export.py writes the
whole embedder. May import every subpackage except `report`.
"""
