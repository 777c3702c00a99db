"""Measures a trained encoder: python eval.py --workdir runs/cifar10 [options]. See --help."""

import sys

from empssl_jax.compilation import keep_compiled_programs
from empssl_jax.config import user_errors_exit
from empssl_jax.evaluation import evaluate, parse_evaluate_options

if __name__ == "__main__":
    with user_errors_exit():
        keep_compiled_programs()
        evaluate(parse_evaluate_options(sys.argv[1:]))
