"""EMP-SSL on CIFAR-10 as published: one epoch, 20 patches an image, ResNet-18. Every default is the paper's.

    python train.py
    python eval.py --workdir runs/cifar10

For a GPU or TPU: an epoch is a million patches, half a day on two CPU cores (for these see cifar10_cpu.py).
Published for one epoch (of PyTorch implementations, on the original images): kNN 74.3 %, linear 82.1 to 84.2 %.
"""

from empssl_jax.config import Config

config = Config()
