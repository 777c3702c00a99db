"""Measures trained encoders: python eval.py --workdir runs/cifar10 [more runs] [options]. See --help."""

import sys

from empssl_jax.command_line import user_errors_exit
from empssl_jax.evaluation.comparison import evaluate_all, parse_evaluations
from empssl_jax.runtime.compilation import keep_compiled_programs
from empssl_jax.runtime.distributed import processes
from empssl_jax.runtime.interruption import end_at_sigterm

if __name__ == "__main__":
    with user_errors_exit():
        keep_compiled_programs()
        options = parse_evaluations(sys.argv[1:])
        with processes(options[0].distributed):
            end_at_sigterm()
            evaluate_all(options)
