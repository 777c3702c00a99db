"""Stops a run between two steps on a signal. Several processes all stop at the same step."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point


def begin_at(first_step: int) -> None:
    """Reports to JAX the step at which the run begins. Call it before anything slow.

    Without this call, a signal makes several processes agree to stop at step 1, which a resumed run has already passed.
    """
    reached_preemption_sync_point(first_step)


def end_at_sigterm() -> None:
    """Makes SIGTERM end this process at once, even if JAX handles the signal, as it does with several processes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], int | None]]:
    """Yields a function that returns the signal on which the run ends after this step, or None.

    Call it after each step with the number of steps done. Orbax asks JAX about the same numbers when it saves.

    With several processes, all must call it after every step. JAX reports a signal to one of them to all, and they
    agree on a step that none has passed. SIGINT then counts as SIGTERM. Afterwards SIGTERM ends the process at once.
    """
    if jax.process_count() == 1:
        with deferred_signals() as received:
            yield lambda steps_done: received[0] if received else None
        return
    with _interrupt_as_termination():
        yield lambda steps_done: signal.SIGTERM if reached_preemption_sync_point(steps_done) else None
    end_at_sigterm()


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGTERM and SIGINT until the current step ends. A second signal interrupts at once.

    Raises:
        KeyboardInterrupt: on the second signal.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interrupt_as_termination() -> Iterator[None]:
    """Turns the first SIGINT into SIGTERM; a second one interrupts at once."""

    def receive(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        signal.raise_signal(signal.SIGTERM)

    previous = signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
