"""EMP-SSL's recipe for CIFAR-10, one epoch: every default is the paper's.

python train.py
"""

from empssl_jax.config import Config

config = Config()
