"""What a submitted job asks SLURM for, as the trainer's config says it: a process per GPU, and no GPU on the CPU.

`conf/hydra/slurm.yaml` reads these two by the resolvers of the same names; everything else there is plain keys. The
third names what `conf/sweep/optuna.yaml` learns from, and the fourth the jobs of a multirun.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence

SWEPT_KEYS = "LDM_SWEPT_KEYS"  # environment variable: which keys a multirun varies, for its jobs wherever they run
_MOST_CHARACTERS = 150  # of a job's name: file systems allow 255 bytes
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
    return f"{name} {metric} {_digest(settings)}"


def job_name(overrides: Iterable[str], swept: Collection[str], excluded: Collection[str]) -> str:
    """The name of a job of a multirun: what it varies, and a hash of its other settings, `optimizer.lr=1e-4-5f2c81`.

    Jobs of equal settings have equal names, whatever the order in which these are written, and others have others.

    Args:
        overrides: of the job, as they were written.
        swept: the keys that the multirun varies; none: all are told, so that jobs differ.
        excluded: keys that belong to no job's name.
    """
    last = {each.lstrip("+~").split("=", 1)[0]: each for each in overrides}
    told = {key: last[key] for key in sorted(last) if key not in excluded}
    varied = [each for key, each in told.items() if key in swept] or list(told.values())
    name, rest = ",".join(varied).replace("/", "_"), [each for each in told.values() if each not in varied]
    shortened = name if len(name) <= _MOST_CHARACTERS else f"{name[:130]}-{_digest([name])}"
    return f"{shortened}-{_digest(rest)}" if rest else shortened


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha1(chr(10).join(words).encode()).hexdigest()[:6]
