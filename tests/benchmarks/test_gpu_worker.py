"""The process that measures parts of the GPU check survives whatever becomes of them."""

import os
import time
from collections.abc import Iterator

import pytest

from benchmarks.gpu_check.worker import NotHere, Part, Row, Rows, Worker


def work(name: str, earlier: Rows) -> Iterator[Row]:
    """Parts of every kind; a process of its own imports this file, so that it loads little."""
    yield {"rate": 1.5, "share": float("nan")}
    if name == "fails":
        raise ValueError("no such\nkernel")
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(3600)
    if name == "absent":
        raise NotHere("needs two GPUs")
    yield {"earlier": sorted(earlier), "process": os.getpid()}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker(work)
    yield started
    started.close()


def good(worker: Worker) -> int:
    """The process of a part that ends well."""
    part = worker.measure("good", {"before": []}, 60)
    assert (part.error, part.skipped) == (None, None) and part.rows[0] == {"rate": 1.5, "share": "nan"}
    assert part.rows[1]["earlier"] == ["before"]
    return part.rows[1]["process"]


@pytest.mark.parametrize(
    ("name", "limit", "expected"),
    [
        ("fails", 60, {"error": "ValueError: no such kernel"}),
        ("dies", 60, {"error": "its process ended with code 3"}),
        ("hangs", 3, {"error": "ended after 3 s"}),
    ],
)
def test_a_part_that_fails_costs_its_process_and_nothing_else(worker, name, limit, expected):
    before = good(worker)
    part = worker.measure(name, {}, limit)
    assert part == Part([{"rate": 1.5, "share": "nan"}], part.seconds, **expected)
    assert good(worker) != before


def test_a_part_that_is_not_for_this_machine_keeps_the_process(worker):
    before = good(worker)
    assert worker.measure("absent", {}, 60).skipped == "needs two GPUs"
    assert good(worker) == before
