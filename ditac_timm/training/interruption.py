"""SIGTERM and SIGINT: finish the update, agree among all processes, save, leave."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Interruption", "hear_of_dead_workers_when_fetching", "ignore_in_workers"]


class Interruption:
    """Whether any process of the run was asked to stop.

    All processes must call `agreed` equally often, for they learn of it together: each call starts a reduction that the
    next one reads, so that no update waits for it.
    """

    def __init__(self, distributed: bool) -> None:
        self.signal: signal.Signals | None = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._distributed = distributed
        self._group: Any = None
        if distributed and dist.get_backend() != "gloo":  # on the CPU, so that no device waits either
            self._group = dist.new_group(backend="gloo")

    def agreed(self) -> bool:
        """Whether some process was asked to stop before it last called this (a single one: before now)."""
        if not self._distributed:
            return self.signal is not None
        before, asked = self._pending, torch.tensor([self.signal is not None], dtype=torch.int32)
        self._pending = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True), asked
        if before is None:
            return False
        work, result = before
        work.wait()
        return bool(result.item())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take both signals; a second one does what it would have done at first."""
        before: dict[signal.Signals, Any] = {}

        def take(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number)
            for name, handler in before.items():
                signal.signal(name, handler)

        try:
            for name in (signal.SIGTERM, signal.SIGINT):
                before[name] = signal.signal(name, take)
        except ValueError:  # not the main thread, which alone may
            pass
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def ignore_in_workers(loader: Any) -> None:
    """Let a loader's processes outlive a signal to the whole process group: the last update still needs them."""
    loader = getattr(loader, "loader", loader)
    loader.worker_init_fn = partial(_start_worker, init=loader.worker_init_fn)


def _start_worker(worker: int, init: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker)


def hear_of_dead_workers_when_fetching() -> None:
    """Take torch's handler of SIGCHLD away, which raises wherever the main process is, be it half-way in an update.

    The loader looks after its processes as well, whenever it waits for one.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
