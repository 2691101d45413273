"""Run a function in two gloo processes on this machine, as ``torchrun`` would start them."""

from __future__ import annotations

import base64
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as processes

from tests.forks import Forks

WORLD_SIZE = 2


def run_in_two_processes(forks: Forks, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(*arguments)`` in each process, forked once its module is imported; shows what a process raised."""
    asked = base64.b64encode(pickle.dumps((work, arguments))).decode()
    done = forks.run(["-c", f"from tests.distributed import fork_two; fork_two({asked!r})"])
    assert done.returncode == 0, done.stderr


def fork_two(asked: str) -> None:
    """Fork both from this process and wait for them."""
    work, arguments = pickle.loads(base64.b64decode(asked))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes.start_processes(_start, args=(port, work, arguments), nprocs=WORLD_SIZE, start_method="fork")


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
