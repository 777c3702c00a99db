"""Trains an EMP-SSL encoder: python train.py [--config configs/cifar10.py] [options]. See --help."""

import sys
from pathlib import Path

from empssl_jax.command_line import parse_train_options, user_errors_exit
from empssl_jax.runtime.compilation import keep_compiled_programs
from empssl_jax.runtime.distributed import processes
from empssl_jax.training import train

if __name__ == "__main__":
    with user_errors_exit():
        keep_compiled_programs()
        config = parse_train_options(sys.argv[1:], Path(__file__).parent / "configs" / "cifar10.py")
        with processes(config.distributed):
            train(config)
