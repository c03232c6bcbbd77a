"""The processes of benchmarks/gpu_check.sh: a kernel may crash one or hang it, and the others go on."""

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from workers import DIED, HUNG, LATE, spread


def act(what: str, number: int) -> int:
    if what == "die":
        os._exit(3)
    if what == "hang":
        time.sleep(600)
    return number + 1


def test_what_dies_or_hangs_is_named_and_the_rest_goes_on():
    tasks = [("die", 0), ("add", 1), ("hang", 2), ("add", 3), ("die", 4), ("add", 5)]
    began = time.monotonic()
    found = {task: (result, trouble) for task, result, trouble in spread(act, tasks, 2, seconds=15, grace=0)}
    assert time.monotonic() - began < 60
    want = {"die": (None, DIED), "hang": (None, HUNG)}
    assert found == {(what, number): want.get(what, (number + 1, "")) for what, number in tasks}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_begins_when_the_time_is_up(workers):
    found = list(spread(act, [("add", 1), ("add", 2)], workers, seconds=-1))
    assert found == [(("add", 1), None, LATE), (("add", 2), None, LATE)]


def test_without_processes():
    assert list(spread(act, [("add", 1)], 0, seconds=60)) == [(("add", 1), 2, "")]
