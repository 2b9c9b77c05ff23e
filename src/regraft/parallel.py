"""Work on all cores: linear algebra on one thread each, small pictures in processes."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from typing import Generic, TypeVar, cast

from threadpoolctl import threadpool_limits

Function = TypeVar("Function", bound=Callable[..., object])
Item = TypeVar("Item")
Result = TypeVar("Result")


def one_thread(function: Function) -> Function:
    """Keeps linear algebra on one thread.

    A second one of OpenBLAS waits by spinning: beside another job on the same cores one thread is
    3 to 12 times as fast (docs/log.md 2026-11-25).
    """
    return cast(Function, threadpool_limits.wrap(limits=1, user_api="blas")(function))


def parts(number: int, most: int) -> list[range]:
    """Returns ranges of at most so many items that make up `number`, several for each core."""
    size = max(1, min(most, number // (8 * (os.cpu_count() or 1))))
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], died: Callable[[Item], Result]
) -> Iterator[Result]:
    """Yields the results in order; each process takes every so many-th item.

    Threads that read small pictures wait for the interpreter's lock: two processes take half the
    time of two threads (docs/log.md 2026-11-25). They are forked, so they see all that is here;
    arrays that they fill must be shared memory. They hold what is open here, locks too: not for a
    process that has a Run.

    Args:
        function: Called in a process, but where libraries do not bear a fork (not Linux).
        items: Known beforehand.
        died: Called instead for an item whose process has died of it, or of too little memory.
    """
    if sys.platform != "linux":
        yield from map(function, items)
        return
    number = min(os.cpu_count() or 1, len(items))
    workers: list[_Worker[Item, Result]] = []
    try:
        for first in range(number):
            workers.append(_Worker(function, items[first::number], workers))
        for place, item in enumerate(items):
            try:
                result, error = workers[place % number].pipe.recv()
            except EOFError:
                result, error = died(item), None
                workers[place % number].close()
                left = items[place + number :: number]
                workers[place % number] = _Worker(function, left, workers)
            if error is not None:
                raise error
            yield result
    finally:
        for worker in workers:
            worker.close()


class _Worker(Generic[Item, Result]):
    """One forked process, and the pipe through which it gives its results."""

    def __init__(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        others: "Sequence[_Worker[Item, Result]]",
    ) -> None:
        fork = get_context("fork")
        self.pipe, theirs = fork.Pipe(duplex=False)

        def work() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # who waits for us ends us
            for pipe in (self.pipe, *(other.pipe for other in others)):
                pipe.close()  # so that a write fails when nobody reads any more
            with suppress(BrokenPipeError):
                for item in items:
                    theirs.send(_result(function, item))

        self._process = fork.Process(target=work, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: ours wait
            self._process.start()
        theirs.close()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _result(
    function: Callable[[Item], Result], item: Item
) -> tuple[Result, None] | tuple[None, Exception]:
    try:
        return function(item), None
    except Exception as error:  # noqa: BLE001 raised again where the results are wanted
        return None, error
