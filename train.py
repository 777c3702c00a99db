"""Trains an EMP-SSL encoder: python train.py [--config configs/cifar10.py] [options]. See --help."""

import sys

from empssl_jax.command_line import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
