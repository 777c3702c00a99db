"""Measures trained encoders: python eval.py --workdir runs/cifar10 [more runs] [options]. See --help."""

import sys

from empssl_jax.command_line import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
