"""An asyncio event loop in a thread of its own, for a program that is not asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Collection, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoopThread:
    """Runs coroutines while the trainer computes.

    The thread is a daemon: it never keeps the process alive.
    """

    def __init__(self, name: str = "megaopd-rollout") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine's result; not from within the loop."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C, say: nobody waits for it any more.
            future.cancel()
            raise

    def give_up(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Cancels a coroutine that was submitted, and waits until it has ended."""
        self.run(_cancel(coroutine))

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancels what still runs and ends the thread; a second call does nothing."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            self.submit(_cancel_all()).result(timeout_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel(coroutine: Coroutine[Any, Any, Any]) -> None:
    await _end({task for task in asyncio.all_tasks() if task.get_coro() is coroutine})


async def _cancel_all() -> None:
    await _end(asyncio.all_tasks() - {asyncio.current_task()})


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
