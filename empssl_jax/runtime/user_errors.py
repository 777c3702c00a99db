"""Shows users one sentence and an exit code for an error, not a stack trace, in characters that can be printed."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator

from empssl_jax.config.errors import UserError, one_line

MORE_MEMORY = "end other programs, or use a machine with more memory"


@contextlib.contextmanager
def user_errors_exit(memory_remedy: str = MORE_MEMORY) -> Iterator[None]:
    """Turns errors that the user can fix into one sentence and an exit code, and Ctrl-C into exit code 130.

    These errors are UserError, failures of the file system, too little memory, for which `memory_remedy` says what to
    do, and output that nothing reads any more.
    """
    _silence_background_threads()
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        remedy = "pipe the output into one that reads all of it, or write it to a file"
        print(f"error: the program that reads the output has ended: {remedy}.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        print(f"error: {one_line(error)}: free disk space, fix the file or give another folder.", file=sys.stderr)
        raise SystemExit(UserError.exit_code) from None
    except (MemoryError, RuntimeError) as error:
        # XLA has no exception class for too little memory; the messages differ between GPU and CPU.
        if not (isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))):
            raise
        print(f"error: out of memory ({one_line(error)}): {memory_remedy}.", file=sys.stderr)
        raise SystemExit(UserError.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        _flush_output()


def _flush_output() -> None:
    """Writes what is left of the output, or drops it if nothing reads it, for which Python would exit with code 120."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass  # a full disk: Python tries again at exit, and then exits with code 120


def escape_unprintable_characters() -> None:
    """Makes this process print characters that its terminal or log cannot hold as escapes, such as \\xe9.

    File names may contain any characters, also bytes that are not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence_background_threads() -> None:
    """Hides the stack traces of Orbax's and TensorStore's threads. The run gets these errors, too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
