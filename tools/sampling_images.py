"""How `tools/sample.py` makes its images: what they begin with, in which precision, and batch by batch."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sampling_requests import Request, batches
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.conditioning import Conditioner, SemanticMapConditioner
from ldm_train.data.crops import Shape, covering_box
from ldm_train.data.segmentation import VOID
from ldm_train.data.transforms import cut, decode_rgb, resize, resize_classes, to_signed_unit
from ldm_train.diffusion import (
    ClassifierFreeGuidance,
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    EulerSampler,
    HeunSampler,
    Sampler,
)
from ldm_train.metrics import to_uint8
from ldm_train.stages import LatentDiffusion, Original

SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "ddpm": DDPMSampler,
    "euler": EulerSampler,
    "heun": HeunSampler,
    "dpm_solver": DPMSolverSampler,
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of the networks' arithmetic; the decoder and what the normalisations measure are always float32."""
MAX_PIXELS = 1 << 28
"""Of a picture to begin with."""
NO_CLASS = 255
"""In a semantic map, where no class has this number."""


class Start(NamedTuple):
    """What all images have in common besides their prompts.

    Attributes:
        shape: height and width.
        original: the picture to begin with (1, 3, H, W), or `None`.
        classes: the semantic map (H, W), or `None`.
    """

    shape: Shape
    original: Original | None = None
    classes: Tensor | None = None


class Picture(NamedTuple):
    """An image that was made.

    Attributes:
        request: what for.
        pixels: (3, H, W) bytes on the CPU.
        row: its place in its batch.
        batch_size: images in that batch.
    """

    request: Request
    pixels: Tensor
    row: int
    batch_size: int


def set_sampling(stage: LatentDiffusion, arguments: Namespace) -> None:
    """Sample as told, and as the stage's config says where nothing is told.

    Raises:
        ValueError: if the sampler has no such setting, or the setting no such value.
    """
    old, guidance = stage.sampler, stage.guidance
    kind = type(old) if arguments.sampler is None else SAMPLERS[arguments.sampler]
    steps = old.num_steps if arguments.steps is None else arguments.steps
    own: dict[str, float] = {} if kind is not DDIMSampler else {"eta": getattr(old, "eta", 0.0)}
    if kind in (EulerSampler, HeunSampler) and hasattr(old, "churn"):
        own["churn"] = old.churn
    if arguments.eta is not None:
        if kind is not DDIMSampler:
            raise ValueError(f"--eta is {arguments.eta}, which {kind.__name__} has not; allowed with --sampler ddim")
        own["eta"] = arguments.eta
    stage.sampler = kind(steps, spacing=old.spacing, clip_x_0=old.clip_x_0, final_alpha=old.final_alpha, **own)
    stage.sampler.steps(stage.denoiser.schedule)
    scale = guidance.scale if arguments.guidance is None else arguments.guidance
    stage.guidance = ClassifierFreeGuidance(scale, guidance.rescale, guidance.interval)


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError if the device does not compute in a precision."""
    allowed = ["float32", "bfloat16"]
    if device.type == "cuda":
        allowed = ["float32", *(["bfloat16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])]
        allowed += ["float16"]
    if precision not in allowed:
        raise ValueError(
            f"--precision is {precision} on the device {device.type}; allowed there are {', '.join(allowed)}; change "
            "--precision or --device"
        )


def shape_of(arguments: Namespace, own: Shape, multiple: int) -> Shape:
    """Height and width of the images: the model's own, or as told.

    Raises:
        ValueError: if they are no multiples of what the networks halve them by.
    """
    side = arguments.image_size
    height = arguments.height or side or own.height
    width = arguments.width or side or own.width
    if height % multiple or width % multiple:
        raise ValueError(
            f"images of {width} x {height} pixels are asked for; allowed are multiples of {multiple}, by which this "
            "model's networks divide them; change --image-size, --width or --height"
        )
    return Shape(height, width)


def start_of(arguments: Namespace, shape: Shape, conditioner: Conditioner) -> Start:
    """What the images begin with.

    Raises:
        FileNotFoundError: if a picture is not there.
        ValueError: if it is none, or a strength or a mask has no image to be of.
    """
    classes = None
    for part in conditioner.modules():
        if isinstance(part, SemanticMapConditioner):
            classes = read_classes(arguments.segmentation, shape, part.num_classes)
    return Start(shape, _original(arguments, shape), classes)


def _original(arguments: Namespace, shape: Shape) -> Original | None:
    if arguments.image is None:
        if arguments.mask is not None or arguments.strength is not None:
            raise ValueError("--mask or --strength is given without a picture; allowed with one; give --image")
        return None
    hole = None if arguments.mask is None else read_picture(arguments.mask, shape, "--mask").mean(0, keepdim=True) > 0.0
    known = None if hole is None else (~hole).float()[None]
    strength = (1.0 if known is not None else 0.6) if arguments.strength is None else arguments.strength
    return Original(read_picture(arguments.image, shape, "--image")[None], strength, known)


def read_picture(path: Path, shape: Shape, option: str) -> Tensor:
    """The middle of a picture: (3, H, W) in [-1, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture.
    """
    try:
        pixels = decode_rgb(_content(path, option), max_pixels=MAX_PIXELS)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); allowed is a picture; change {option}") from error
    return to_signed_unit(resize(cut(pixels, covering_box(Shape(*pixels.shape[-2:]), shape)), shape))


def read_classes(path: Path, shape: Shape, num_classes: int) -> Tensor:
    """The middle of a semantic map: (H, W) int64 classes, -1 for none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture of one channel, or holds what is no class.
    """
    option = "--segmentation"
    try:
        with Image.open(BytesIO(_content(path, option))) as image:
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); allowed is a PNG; change {option}") from error
    if values.ndim != 2:
        raise ValueError(
            f"{path} has the channels {mode}; allowed is one channel, grey or palette, whose values are classes; "
            f"change {option}"
        )
    classes = torch.from_numpy(values.astype(np.int64))
    if num_classes <= NO_CLASS:
        classes = torch.where(classes == NO_CLASS, VOID, classes)
    if (largest := int(classes.max())) >= num_classes:
        raise ValueError(
            f"{path} holds the value {largest}; allowed are 0 to {num_classes - 1}, and {NO_CLASS} for no class; "
            f"change {option}"
        )
    return resize_classes(cut(classes, covering_box(Shape(*classes.shape), shape)), shape)


def _content(path: Path, option: str) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}; allowed is a file; change {option}")
    return path.read_bytes()


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Inside, networks compute in a precision."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def generate(
    stage: LatentDiffusion, start: Start, requests: Sequence[Request], batch_size: int, precision: str
) -> Iterator[Picture]:
    """The requested images, in order."""
    for part in batches(requests, batch_size):
        for row, pixels in enumerate(generate_batch(stage, start, part, precision)):
            yield Picture(part[row], pixels, row, len(part))


def generate_batch(stage: LatentDiffusion, start: Start, part: Sequence[Request], precision: str) -> Tensor:
    """Images of one batch, all with a negative prompt or none: (B, 3, H, W) bytes on the CPU."""
    seeds = torch.tensor([request.seed for request in part], device=stage.device)
    batch = ImageTextBatch(
        image=torch.zeros(len(part), 3, *start.shape, device=stage.device),
        caption=[request.prompt for request in part],
        sample_id=seeds,
        position=torch.arange(len(part), device=stage.device),
        epoch=0,
        key=[f"seed {request.seed}" for request in part],
    )
    if part[0].label is not None:
        batch["label"] = torch.tensor([request.label for request in part], device=stage.device)
    if start.classes is not None:
        batch["segmentation"] = start.classes.to(stage.device).expand(len(part), *start.shape)
    away = None
    if part[0].negative is not None:
        away = batch | {"caption": [request.negative or "" for request in part]}
    with arithmetic(precision, stage.device):
        images = stage.generate(batch, seeds, away, _repeated(start.original, len(part), stage.device))
    return to_uint8(images.float()).cpu()


def _repeated(start: Original | None, count: int, device: torch.device) -> Original | None:
    """The one image and mask, `count` times."""
    if start is None:
        return None
    known = None if start.known is None else start.known.to(device).expand(count, -1, -1, -1)
    return Original(start.image.to(device).expand(count, -1, -1, -1), start.strength, known)
