"""A process that measures parts one after the other, whatever becomes of any of them."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from multiprocessing.connection import Connection
from typing import Any

Row = dict[str, Any]  # column -> number or text
Rows = dict[str, list[Row]]  # of parts, by name
Work = Callable[[str, Rows], Iterator[Row]]  # a part's rows, from its name and the rows of earlier parts


class NotHere(Exception):
    """Why a part has nothing to measure here."""


@dataclass
class Part:
    """What became of a part."""

    rows: list[Row] = field(default_factory=list)  # those that were measured before an error, too
    seconds: float = 0.0
    error: str | None = None
    skipped: str | None = None  # why


class Worker:
    """Another process begins after a part that failed: an error of CUDA may leave nothing usable behind."""

    def __init__(self, work: Work):
        self.work = work
        self._process: Any = None
        self._connection: Any = None

    def measure(self, name: str, earlier: Rows, limit: float) -> Part:
        """A part, which is ended after `limit` seconds."""
        part, started = Part(), time.monotonic()
        if self._process is None:
            self._start()
        self._connection.send((name, earlier))
        while True:
            try:
                if not self._connection.poll(max(started + limit - time.monotonic(), 0)):
                    part.error = f"ended after {limit:.0f} s"
                    break
                kind, value = self._connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                part.error = f"its process ended with code {self._process.exitcode}"
                break
            if kind != "row":
                setattr(part, kind, value)
                break
            part.rows.append(value)
        part.seconds = round(time.monotonic() - started, 1)
        if part.error is not None:
            self.close()
        return part

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.work))
        self._process.start()
        theirs.close()


def serve(connection: Connection, work: Work) -> None:
    """Send the rows of the parts that are asked for, and what became of each."""
    while True:
        try:
            name, earlier = connection.recv()
        except EOFError:
            return
        answer: tuple[str, str | None] = "error", None
        try:
            for row in work(name, earlier):
                connection.send(("row", {column: as_json(value) for column, value in row.items()}))
        except NotHere as reason:
            answer = "skipped", str(reason)
        except Exception as error:
            traceback.print_exc()
            answer = "error", " ".join(f"{type(error).__name__}: {error}".split())[:300]
        connection.send(answer)


def as_json(value: Any) -> Any:
    """JSON has no infinity and no nan."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value
