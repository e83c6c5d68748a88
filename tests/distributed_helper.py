"""Run a test's function in several processes that talk through gloo."""

import datetime
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_distributed(func: Callable[..., None], world_size: int, *arguments: Any, timeout_s: float = 120) -> None:
    """Call `func(*arguments)` in `world_size` fresh processes of one gloo group.

    `func` must stand at the top of a module. A failing process ends the others, and its traceback is in the error.
    The processes meet through a file, so that no port is needed.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _run_rank, args=(world_size, Path(folder, "meet").as_uri(), timeout_s, func, arguments), nprocs=world_size
        )


def _run_rank(
    rank: int, world_size: int, meet: str, timeout_s: float, func: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s)
    )
    try:
        func(*arguments)
    finally:
        dist.destroy_process_group()
