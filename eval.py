"""Measures a trained encoder: python eval.py --workdir runs/cifar10 [options]. See --help."""

import sys

from empssl_jax.compilation import keep_compiled_programs
from empssl_jax.config import user_errors_exit
from empssl_jax.distributed import processes
from empssl_jax.evaluation import evaluate, parse_evaluate_options
from empssl_jax.interruption import end_at_sigterm

if __name__ == "__main__":
    with user_errors_exit():
        keep_compiled_programs()
        options = parse_evaluate_options(sys.argv[1:])
        with processes(options.distributed):
            end_at_sigterm()
            evaluate(options)
