"""EMP-SSL on CIFAR-10 as published: one epoch, 20 patches an image, ResNet-18. All defaults are the paper's.

    python train.py
    python eval.py --workdir runs/cifar10

For a GPU or TPU: an epoch is a million patches, which takes half a day on two CPU cores (use cifar10_cpu.py there).
Published for one epoch (PyTorch implementations, original images): kNN 74.3 %, linear 82.1 to 84.2 %.
"""

from empssl_jax.config import Config

config = Config()
