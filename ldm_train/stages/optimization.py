"""How a stage's parameters are optimised: one optimizer, one learning rate curve that counts optimizer steps.

Learning rates are absolute: nothing multiplies them by the number of GPUs or the batch. The curves multiply the
optimizer's rate by a factor of the step s,

    warm-up: (s + 1) / (w + 1) for s < w      constant: 1      cosine: f + (1 - f) (1 + cos(pi (s - w) / (S - w))) / 2
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

ParameterGroups = list[nn.Parameter] | list[dict[str, Any]]
OptimizerFactory = Callable[[ParameterGroups], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def optimizers(
    parameters: ParameterGroups, optimizer: OptimizerFactory, lr_scheduler: SchedulerFactory | None
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns: one optimizer of parameters or groups, its curve stepped every step."""
    built = optimizer(parameters)
    if lr_scheduler is None:
        return {"optimizer": built}
    return {"optimizer": built, "lr_scheduler": {"scheduler": lr_scheduler(built), "interval": "step"}}


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training may change."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def clip_groups(optimizer: Optimizer, limit: float | None, algorithm: str | None) -> None:
    """Clip each parameter group's gradients by its own norm (algorithm `norm`, or `None`) or by `value`.

    Args:
        optimizer: its groups are clipped where they have gradients.
        limit: the largest norm or value; `None` or 0 clips nothing.
        algorithm: as `trainer.gradient_clip_algorithm`.
    """
    if not limit:
        return
    clip = torch.nn.utils.clip_grad_value_ if algorithm == "value" else torch.nn.utils.clip_grad_norm_
    for group in optimizer.param_groups:
        clip(group["params"], limit)


def warmup_constant(optimizer: Optimizer, warmup_steps: int) -> LRScheduler:
    """Linear warm-up over `warmup_steps` optimizer steps, then the optimizer's own rate."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, final_factor: float = 0.0) -> LRScheduler:
    """Linear warm-up, then a half cosine (Loshchilov and Hutter 2017, eq. 5) to `final_factor` at `total_steps`."""
    if total_steps <= warmup_steps:
        raise ValueError(
            f"total_steps is {total_steps} and warmup_steps {warmup_steps}; allowed are more steps in all than in the "
            "warm-up; change `trainer.max_steps` or `lr_scheduler.warmup_steps`"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
