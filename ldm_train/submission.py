"""What a submitted job asks SLURM for, as the trainer's config says it: a process per GPU, and no GPU on the CPU.

`conf/hydra/slurm.yaml` reads these two by the resolvers of the same names; everything else there is plain keys. The
third names what `conf/sweep/optuna.yaml` learns from.
"""

import hashlib
from collections.abc import Iterable

_NO_SETTING = ("logger", "paths.", "resume=", "run_id=", "name=", "metric=", "sweep=")


def tasks_per_node(devices: object) -> int:
    """The processes of a job on each of its nodes.

    Args:
        devices: `trainer.devices`.

    Raises:
        ValueError: if it is no number: a job asks for its GPUs before anyone has seen its nodes.
    """
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(
            f"trainer.devices is {devices!r}; allowed in a job that is submitted is the number of its GPUs, or of its "
            "processes, on each node; take `trainer=slurm`, and change `trainer.devices`"
        )
    return devices


def gpus_per_node(accelerator: str, devices: object) -> int | None:
    """The GPUs of a job on each of its nodes; None, which asks for nothing, where it computes on the CPU.

    Args:
        accelerator: `trainer.accelerator`.
        devices: `trainer.devices`.
    """
    return None if accelerator == "cpu" else tasks_per_node(devices)


def study_of(name: str, metric: str, overrides: Iterable[str]) -> str:
    """The name of a study of Optuna's: trials of other budgets or settings tell it nothing, and have one of their own.

    Args:
        name: of the runs.
        metric: what is compared.
        overrides: of the command, as they were written.
    """
    settings = sorted(each for each in overrides if not each.lstrip("+~").startswith(_NO_SETTING))
    return f"{name} {metric} {hashlib.sha1(chr(10).join(settings).encode()).hexdigest()[:6]}"
