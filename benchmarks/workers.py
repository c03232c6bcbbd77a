"""Tasks over processes that may crash or hang, as a faulty kernel makes them: the others go on, it is named."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import connection, get_context
from typing import Any

GRACE = 30.0
"""Seconds after the end that a task begun in time may still take."""
LATE, DIED, HUNG = "left out: the time is up", "its process died", "stopped: it did not end"


def spread(
    work: Callable, tasks: Iterable[tuple], workers: int, seconds: float, grace: float = GRACE
) -> Iterator[tuple[tuple, Any, str]]:
    """Each task, ``work(*task)`` and "" as they come from ``workers`` processes, 0: from this one.

    A task without a result has None, and one of :data:`LATE`, :data:`DIED` and :data:`HUNG`.
    """
    waiting, end = deque(tasks), time.monotonic() + seconds
    while waiting and not workers:
        task, late = waiting.popleft(), time.monotonic() >= end
        yield (task, None, LATE) if late else (task, work(*task), "")
    idle: list[Worker] = []
    busy: dict[Any, tuple[Worker, tuple]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers and time.monotonic() < end:
                worker = idle.pop() if idle else Worker(work)
                busy[worker.pipe] = worker, waiting.popleft()
                worker.pipe.send(busy[worker.pipe][1])
            if time.monotonic() >= end:
                yield from ((task, None, LATE) for task in waiting)
                waiting.clear()
            limit = end if waiting else end + grace
            ready = connection.wait(list(busy), timeout=max(0.0, limit - time.monotonic()))
            for pipe in ready:
                worker, task = busy.pop(pipe)
                try:
                    result, fit = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    worker.end()
                    yield task, None, DIED
                    continue
                if fit:
                    idle.append(worker)
                else:
                    worker.end()
                yield task, result, ""
            if not ready and not waiting and time.monotonic() >= limit:
                yield from ((task, None, HUNG) for _, task in busy.values())
                return
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.end()


class Worker:
    """A process that does one task after the other."""

    def __init__(self, work: Callable):
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, work))
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def serve(pipe: Any, work: Callable) -> None:
    """In the process: results, each with whether the process is fit for another task."""
    with suppress(EOFError):
        while True:
            pipe.send((work(*pipe.recv()), device_works()))


def device_works() -> bool:
    """Whether this process can still use the GPU: after a fault on it no call of the process succeeds."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return False
    return True
