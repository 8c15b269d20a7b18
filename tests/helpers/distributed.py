"""Runs a function in several fresh processes joined by gloo, with a time limit and nothing left
over."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaopd.parallel.gloo import share_device
from tests.helpers.processes import process_context


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60
) -> list[Any]:
    """Calls fn(rank, world_size, *args) in `world_size` processes of their own.

    Each has the default process group initialised (gloo), one thread, and LOCAL_RANK, RANK and
    WORLD_SIZE set. The first failure or the time limit ends all of them by process id.

    Args:
        fn: a function at the top level of an importable module.
        args: picklable arguments, the same for all ranks.
        timeout_s: wall-clock limit for everything, the start of the processes included.

    Returns:
        the return values in rank order; tensors come back by value.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback.
        TimeoutError: the limit passed; the message names the ranks that had not finished.
    """
    context = process_context()
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        readers: dict[int, Connection] = {}
        processes = []
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child,
                    args=(
                        writer,
                        fn,
                        rank,
                        world_size,
                        str(Path(folder) / "store"),
                        timeout_s,
                        args,
                        dict(os.environ),
                    ),
                    daemon=True,
                )
                process.start()
                writer.close()
                readers[rank] = reader
                processes.append(process)
            while readers:
                ready = wait(list(readers.values()), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(
                        f"{fn.__name__}: ranks {sorted(readers)} of {world_size} not done "
                        f"after {timeout_s} s"
                    )
                for rank in [r for r, reader in readers.items() if reader in ready]:
                    results[rank] = _receive(readers.pop(rank), rank, processes[rank])
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()
    return [results[rank] for rank in range(world_size)]


def _receive(reader: Connection, rank: int, process: Any) -> Any:
    """The result of a rank, or its failure raised."""
    try:
        succeeded, payload = pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join(5)
        message = f"rank {rank} died without a word, exit code {process.exitcode}"
        raise RuntimeError(message) from None
    if not succeeded:
        raise RuntimeError(f"rank {rank} failed:\n{payload}")
    return payload


def _child(
    writer: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    from datetime import timedelta

    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    share_device()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        payload = pickle.dumps((True, fn(rank, world_size, *args)))
        dist.barrier()
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    # Plain pickle carries tensors by value: no shared memory outlives the process.
    writer.send_bytes(payload)
    writer.close()
    if dist.is_initialized():
        dist.destroy_process_group()
