"""SIGTERM and Ctrl-C: training ends at the next step, with a checkpoint."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. A second Ctrl-C does not wait for the step to end."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block SIGTERM and Ctrl-C are noted instead of ending the process."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int) -> None:
    """For loader workers: cluster managers signal whole process groups, and the training process still needs data.

    A worker ends when the training process ends it, by the same signal, or when that process is no more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only Linux says who sent a signal.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
