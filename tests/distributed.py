"""Run a function in two gloo processes on this machine, as ``torchrun`` would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as processes

WORLD_SIZE = 2


def run_in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(*arguments)`` in each process; ``work`` must be importable.  Raises what a process raised."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes.spawn(_start, args=(port, work, arguments), nprocs=WORLD_SIZE)


def _start(rank: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    # Two processes with all the cores' threads each slow each other many times.
    torch.set_num_threads(1)
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        work(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
