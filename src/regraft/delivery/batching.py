"""Batching: images that are asked for one by one are answered several at a time."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 0.01  # how long a batch waits for images that are being decoded; assumed


class Batches:
    """One thread answers what many ask.

    Args:
        answer: Of at most `most` items, in order; called in one thread.
        most: Items at once.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], Sequence[Any]], most: int) -> None:
        self.answer, self.most = answer, most
        self.coming = 0
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Says that an item is on its way, so that a batch may wait for it."""
        self.coming += 1
        try:
            yield
        finally:
            self.coming -= 1
            self._changed.set()

    async def ask(self, item: Any) -> Any:
        """Returns the answer to this item."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._changed.set()
        return await future

    async def alone(self, function: Callable[[Any], Any], item: Any) -> Any:
        """Returns what a function makes of one item, in the same thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, item)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._gather()
            batch, self._waiting = self._waiting[: self.most], self._waiting[self.most :]
            batch = [(item, future) for item, future in batch if not future.done()]  # given up
            if not batch:
                continue
            items = [item for item, _ in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self.answer, items)
            except Exception as error:  # noqa: BLE001  told to all who wait; the next may succeed
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _gather(self) -> None:
        """Waits for an item, and a moment for those that are on their way."""
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        try:
            async with asyncio.timeout(PATIENCE_S):
                while len(self._waiting) < self.most and self.coming:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
