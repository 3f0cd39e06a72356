"""Checkpoints: plain tensors in, strict and safe loading out.

A checkpoint is a dictionary of plain values and tensors, so `torch.load(weights_only=True)` reads it and no code in it
can run. It holds the trained part of a stage's `state_dict`, the averaged weights under `ema`, the resolved config
under `config`, and under `frozen` the digests of the parts that were trained elsewhere. Loading compares every name and
shape and refuses with the whole difference.
"""

import hashlib
import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ldm_train.nn.autoencoder import Autoencoder
from ldm_train.nn.ema import load_average

_log = logging.getLogger(__name__)

UNTRAINED = "untrained"
"""In place of a path: random weights, to see that a run works."""

_LISTED = 8
_UNSAFE = re.compile(r"unsupported (?:global: |operand )?(?:GLOBAL )?\S+", re.IGNORECASE)
# What torch's reader raises for bytes that are no checkpoint depends on where they stop making sense.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success its content is on the disk and has the final name.

    A reader sees the old file or the new one, never half of one, whenever the process or the machine stops.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of two containers or machines that share the folder can have one number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}.tmp")
    try:
        yield temporary
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_durably(source: Path, target: Path) -> None:
    """Rename `source` to `target`, its content flushed to the disk before and its new name after."""
    _flush(source)
    os.replace(source, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path, key: str = "resume", *, is_foreign: bool = False) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Args:
        path: the file.
        key: the config key that named it, for errors.
        is_foreign: it may be a file of others, so any dictionary will do, one of tensors alone as well.

    Returns:
        Its dictionary, on the CPU; tensors are mapped from the file and read when used, but for files of the time
        before torch 1.6, which are no zip archives and cannot be mapped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds more than plain tensors and values.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; allowed is a file that one of the stages has written "
            f"(runs/<name>/<run_id>/checkpoints/last.ckpt); train that stage first, or change `{key}`"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        # Torch's own first lines say how to run the code in such a file after all.
        refused = _UNSAFE.search(str(error))
        reason = refused[0] if refused else next(iter(str(error).splitlines()), type(error).__name__)
        instead = "fetch the file again" if is_foreign else "take `previous.ckpt` beside it"
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); allowed are complete files of plain tensors and "
            f"values; change `{key}`, or {instead}"
        ) from error
    if not isinstance(checkpoint, dict) or not (is_foreign or "state_dict" in checkpoint):
        allowed = "a dictionary of tensors" if is_foreign else "a checkpoint of one of the stages"
        raise ValueError(f"{path} holds no `state_dict`; allowed is {allowed}; change `{key}`")
    return checkpoint


def verify_checkpoint(path: Path, key: str = "resume") -> dict[str, Any]:
    """Read every byte of a checkpoint and compare it with the checksums that the file holds.

    Args:
        path: the file.
        key: the config key that named it, for errors.

    Returns:
        As `read_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is cut, a byte of it has changed, or it holds more than plain tensors and values.
    """
    checkpoint = read_checkpoint(path, key)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except _UNREADABLE as error:
            damaged = f"{type(error).__name__}: {error}"
        if damaged is not None:
            raise ValueError(
                f"{path} is damaged (in {damaged}); allowed are files as they were written; change `{key}`, or take "
                "`previous.ckpt` beside it"
            )
    return checkpoint


def strict_load(module: nn.Module, state: Mapping[str, Tensor], allowed_missing: tuple[str, ...] = ()) -> None:
    """Load a state dict of exactly the module's names and shapes.

    Args:
        module: takes the values.
        state: name -> tensor.
        allowed_missing: prefixes of names that may be absent: the frozen parts, exactly.

    Raises:
        ValueError: with the difference; the module is unchanged then.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.startswith(allowed_missing or ("\0",))]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name}: {tuple(state[name].shape)}, must be {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            "the checkpoint does not fit this model:\n"
            + _listed("missing", missing)
            + _listed("unexpected", unexpected)
            + _listed("other shape", shapes)
            + "allowed are exactly the model's own names and shapes; compose the config the checkpoint was trained "
            "with (groups `autoencoder`, `adversarial`, `unet`, `conditioner`, `stage`), or name another checkpoint"
        )
    module.load_state_dict(dict(state), strict=False)


def load_pretrained(module: nn.Module, checkpoint: str | None, prefix: str, key: str) -> nn.Module:
    """Give a freshly built part the weights it has in a stage's checkpoint: the averaged ones where there are any.

    Args:
        module: the part, as the config describes it.
        checkpoint: path of the checkpoint; `None` leaves the part as it was built; the word `untrained` likewise, and
            takes the latents of an autoencoder as they come.
        prefix: the part's name in the stage, with its dot, such as `autoencoder.`.
        key: the config key that named the checkpoint, for errors.

    Returns:
        The module.
    """
    if checkpoint == UNTRAINED and isinstance(module, Autoencoder):
        _log.warning("`%s` is %s: its latents mean nothing, and neither does what is trained on them", key, UNTRAINED)
        module.calibrate(torch.zeros(module.latent_channels), torch.ones(module.latent_channels))
    if checkpoint is None or checkpoint == UNTRAINED:
        return module
    content = read_checkpoint(Path(checkpoint), key)
    average = content["ema"]["average"] if "ema" in content else {}
    state = content["state_dict"] | average
    strict_load(module, {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
    return module


def load_weights(stage: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a stage a checkpoint's weights for use: the averaged ones where there are any.

    Args:
        stage: a stage; its `on_load_checkpoint` compares names, shapes and the frozen parts' identity.
        checkpoint: as `read_checkpoint` returns it.
    """
    stage.on_load_checkpoint(checkpoint)  # type: ignore[operator]
    load_averaged(stage, checkpoint)


def load_averaged(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Replace the raw weights by a checkpoint's averaged ones, if it has any."""
    if "ema" in checkpoint:
        load_average(module, checkpoint["ema"])


def drop_prefixes(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The entries whose names start with none of the prefixes."""
    return {name: value for name, value in state.items() if not name.startswith(prefixes or ("\0",))}


def digest(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names, types and values of a module's state dict: its identity wherever its file lies.

    Args:
        module: what is identified.
        without: prefixes of names that do not belong to it.

    Returns:
        64 hexadecimal digits.
    """
    result = hashlib.sha256()
    for name, value in drop_prefixes(module.state_dict(), without).items():
        result.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        if value.is_meta:  # it has no values: a model that was built to be looked at
            continue
        array = value.detach().cpu().contiguous()
        result.update(array.flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


# Of an autoencoder: what its moments do not depend on.
_NOT_OF_THE_ENCODER = ("decoder.", "from_latents.", "regularizer.", "latent_mean", "latent_std")


def encoder_digest(autoencoder: nn.Module) -> str:
    """The identity of what gives an image's moments: another decoder or calibration does not change it."""
    return digest(autoencoder, without=_NOT_OF_THE_ENCODER)


def check_digest(part: str, own: str, found: str | None, key: str) -> None:
    """Refuse a checkpoint whose frozen part was another one; `key` is the config key that names this run's.

    Raises:
        ValueError: if the digests differ.
    """
    if own != found:
        raise ValueError(
            f"the checkpoint was trained with another {part} (sha256 {str(found)[:12]}) than this run loads "
            f"({own[:12]}); allowed is the same one; change `{key}`, or start anew with another "
            "`run_id` or `resume=never`"
        )


def _listed(title: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f"    ... and {len(names) - _LISTED} more\n" if len(names) > _LISTED else ""
    return f"  {title}: {len(names)}\n" + "".join(f"    {name}\n" for name in names[:_LISTED]) + more if names else ""
