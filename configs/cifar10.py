"""EMP-SSL on CIFAR-10 as published: one epoch, 20 patches per image, ResNet-18. All defaults are the paper's.

    empssl train
    empssl eval --workdir runs/cifar10

For a GPU or TPU: an epoch is a million patches, whose steps take 11 s on one H200. On two CPU cores, training and
embedding take about half a day; use cifar10_cpu.py there. Measured on one H200, two seeds: kNN 74.2 %, linear 81.8 %.
Published (PyTorch Lightning): kNN 74.3 %, linear 82.1 % (best epoch on the test images).
"""

from empssl_jax.config import Config

config = Config()
