"""Images that the model makes of a class before it is trained on a subject (Ruiz et al. 2023, section 3.2).

They are the model's own idea of the class, which prior preservation holds on to. Image i has the seed i and lies in
`<folder>/<i>.png`, with prompt, seed, digest of the base model and settings in its text fields. What is there is kept,
so an interrupted run goes on, and the next one with this folder makes none; what was made otherwise is refused.

Images are made in groups of fixed members: how many processes work, and which of them were stopped, changes none. Each
process takes a group that nobody holds the lock of; locks of processes that died are free again. So it does not matter
either how processes are started, or whether they know of each other yet.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from PIL import Image, UnidentifiedImageError

from ldm_train.batch import WantedImages
from ldm_train.checkpoint import atomic_write, digest
from ldm_train.locking import take_flock
from ldm_train.stages.latent_diffusion import LatentDiffusion
from ldm_train.stages.lora import OF_TRAINING, LoRAFineTuning
from ldm_train.stages.prompts import Request, images_of, refuse_if_cut, save_image

_log = logging.getLogger(__name__)
_GROUP = 8  # images made at a time; another number would make other roundings


@dataclass(frozen=True)
class _Group:
    """Images `begin` to `end` of those that are wanted, and what makes them."""

    wanted: WantedImages
    begin: int
    end: int
    settings: dict[str, str]

    @property
    def lock(self) -> Path:
        return Path(self.wanted.folder) / f".{self.begin:05d}.lock"

    def missing(self) -> list[int]:
        """Which images are not there."""
        return [i for i in range(self.begin, self.end) if not self.path(i).is_file()]

    def path(self, i: int) -> Path:
        return Path(self.wanted.folder) / f"{i:05d}.png"


def make_class_images(stage: L.LightningModule, wanted: WantedImages, device: torch.device, key: str) -> int:
    """Make the images that are not there yet, with the base model.

    Args:
        stage: the model, before its first step; adapters are switched off.
        wanted: what is to be there in the end.
        device: where the images are made; the stage is where it was afterwards.
        key: the config key of the prompt.

    Returns:
        How many images this process made.

    Raises:
        ValueError: if the stage makes no images, the text encoder would not see the whole prompt, or the folder holds
            images of another.
    """
    if not isinstance(stage, LatentDiffusion):
        raise ValueError(
            f"images of {wanted.prompt!r} are wanted, and {type(stage).__name__} makes none; allowed are stages that "
            f"generate; change `stage`, or set `{key}` to null"
        )
    refuse_if_cut(stage.conditioner, wanted.prompt, f"`{key}`")
    folder = Path(wanted.folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(stage)
    groups = [_Group(wanted, i, min(i + _GROUP, wanted.number), settings) for i in range(0, wanted.number, _GROUP)]
    _refuse_others(wanted, groups, key)
    if not (missing := sum(len(group.missing()) for group in groups)):
        return 0
    _log.info("Making %d of %d images of %r in %s", missing, wanted.number, wanted.prompt, folder)
    with _as_base_model(stage, device):
        made = sum(_make(stage, group, wait=False) for group in groups)
        return made + sum(_make(stage, group, wait=True) for group in groups)  # those that others held


def _make(stage: LatentDiffusion, group: _Group, wait: bool) -> int:
    """Make what is missing of a group; nothing, unless told to wait, if another process is about it."""
    if not group.missing():
        return 0
    with group.lock.open("w") as lock:
        try:
            if not take_flock(lock.fileno(), wait):
                return 0
        except OSError as error:  # some file servers have no locks
            _log.warning("%s cannot be locked (%s): other processes may make the same images", group.lock, error)
        if not (missing := group.missing()):
            return 0
        wanted = group.wanted
        requests = [Request(wanted.prompt, seed) for seed in range(group.begin, group.end)]
        for i, image in enumerate(images_of(stage, wanted.size, requests, _GROUP), start=group.begin):
            if i in missing:
                with atomic_write(group.path(i)) as temporary:
                    save_image(image, temporary, {"prompt": wanted.prompt, "seed": i, **group.settings})
        group.lock.unlink(missing_ok=True)
        return len(missing)


def _settings(stage: LatentDiffusion) -> dict[str, str]:
    """What decides the images beside prompt, size and seed, as it stands in their text fields."""
    base = stage.base_digest if isinstance(stage, LoRAFineTuning) else digest(stage, without=OF_TRAINING)
    sampler = stage.sampler
    settings = {"base": base, "sampler": type(sampler).__name__, "steps": sampler.num_steps}
    return {name: str(value) for name, value in (settings | {"guidance": stage.guidance.scale}).items()}


def _refuse_others(wanted: WantedImages, groups: list[_Group], key: str) -> None:
    """Refuse a folder with images of another prompt, size or model, or made otherwise than those still to be made."""
    is_whole = not any(group.missing() for group in groups)
    compared = {"base"} if is_whole else {*groups[0].settings}
    for group in groups:
        for i in sorted(set(range(group.begin, group.end)) - {*group.missing()}):
            path = group.path(i)
            try:
                with Image.open(path) as image:
                    info, size = image.info, image.size
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); allowed are the images that a run has made there; remove it, "
                    "and it is made again"
                ) from error
            if (info.get("prompt"), size) != (wanted.prompt, (wanted.size, wanted.size)):
                raise ValueError(
                    f"{path} shows {info.get('prompt')!r} at {size[0]} x {size[1]}, and {wanted.prompt!r} at "
                    f"{wanted.size} x {wanted.size} is wanted; allowed is one kind in a folder; change `{key}`, "
                    "remove the folder, or take another `run_id`"
                )
            if other := {name: group.settings[name] for name in compared if info.get(name) != group.settings[name]}:
                found = ", ".join(f"{name} {_shown(info.get(name))}" for name in other)
                now = ", ".join(f"{name} {_shown(value)}" for name, value in other.items())
                raise ValueError(
                    f"{path} was made with {found}, and this run has {now}; allowed are images of one base model, made "
                    f"in one way; remove the folder {wanted.folder}, change `data.mixture.generated_dir`, or bring "
                    "back the model or the settings"
                )


def _shown(value: object) -> str:
    return "unknown" if value is None else str(value)[:12]


@contextmanager
def _as_base_model(stage: LatentDiffusion, device: torch.device) -> Iterator[None]:
    """Inside, the stage is the base model in evaluation mode on the device."""
    before, was_training = stage.device, stage.training
    stage.to(device).eval()
    try:
        with stage.adapters_disabled() if isinstance(stage, LoRAFineTuning) else nullcontext():
            yield
    finally:
        stage.to(before).train(was_training)
