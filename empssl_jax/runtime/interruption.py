"""Stopping a run between two steps: by a signal, and where there are several processes at the same step in all."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point


def begin_at(first_step: int) -> None:
    """Tells JAX at which step the run begins; to be called before anything that takes its time.

    Of several processes that nothing has been told, a signal makes JAX agree on step 1, which a resumed run has passed.
    """
    reached_preemption_sync_point(first_step)


def end_at_sigterm() -> None:
    """Lets SIGTERM end this process at once, also where JAX has taken it over, as it does with several processes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], int | None]]:
    """Yields a function that is asked after each step and tells the signal, if any, by which the run ends there.

    It takes the number of steps done, which Orbax, too, asks JAX about when it saves.

    With several processes, all must ask after every step: a signal to one of them is told to all, which agree on a
    step that none has passed. SIGINT then counts as SIGTERM. Afterwards SIGTERM ends the process at once.
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
    """Collects SIGTERM and SIGINT, for the loop to stop at the end of its step; a second one interrupts at once."""
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
    """The first SIGINT is passed on as SIGTERM; a second one interrupts at once."""

    def receive(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        signal.raise_signal(signal.SIGTERM)

    previous = signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
