"""What a submitted job asks SLURM for, as the trainer's config says it: a process per GPU, and no GPU on the CPU.

`conf/hydra/slurm.yaml` reads these two by the resolvers of the same names; everything else there is plain keys.
"""


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
