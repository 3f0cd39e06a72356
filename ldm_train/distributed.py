"""Ranks and reductions that read the same with one process and with many.

Every function is correct before a process group exists (`global_rank` is then 0, the world has one member and a sum
over ranks is its argument), so that metrics and callbacks hold no `if distributed` of their own.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def _group_exists() -> bool:
    return dist.is_available() and dist.is_initialized()


def global_rank() -> int:
    """This process's rank among all processes of the run."""
    return dist.get_rank() if _group_exists() else 0


def world_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if _group_exists() else 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks; a new tensor, equal on every rank. Shape and dtype are kept."""
    total = value.detach().clone()
    if _group_exists():
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all ranks, for a floating-point tensor; a new tensor, equal on every rank."""
    return all_reduce_sum(value) / world_size()


def all_gather_cat(value: Tensor) -> Tensor:
    """The tensors of all ranks joined along the first dimension, in rank order; equal shapes are required."""
    if not _group_exists():
        return value.detach().clone()
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)
