"""Ranks of a process group, each a process of its own without the ten seconds of imports.

They are forked from a server that has imported everything and has no threads: a fork of this process would copy the
locks that its own threads hold.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing


def run_ranks(function: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Call `function(rank, *args)` in `world` processes at once; an error of any of them is raised here."""
    multiprocessing.set_forkserver_preload(["ldm_train.train", "tests.conftest"])
    torch.multiprocessing.start_processes(_one_rank, (function, args), nprocs=world, start_method="forkserver")


def _one_rank(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(rank, *args)
