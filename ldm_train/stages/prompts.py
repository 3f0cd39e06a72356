"""Images of prompts as data, see `ldm_train.stages.class_images`; for people see `tools/sample.py`.

Image i follows from the weights, its prompt, the sampler's settings and its own seed alone, whatever is made beside it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.conditioning import Conditioner, TextConditioner
from ldm_train.metrics import to_uint8
from ldm_train.stages.latent_diffusion import LatentDiffusion


class Request(NamedTuple):
    """One image to make: of a prompt, from the noise of a seed."""

    prompt: str
    seed: int


def images_of(stage: LatentDiffusion, size: int, requests: list[Request], batch_size: int) -> Iterator[Tensor]:
    """The requested images in order: (3, size, size) bytes on the CPU."""
    for begin in range(0, len(requests), batch_size):
        part = requests[begin : begin + batch_size]
        seeds = torch.tensor([request.seed for request in part], device=stage.device)
        batch = ImageTextBatch(
            image=torch.zeros(len(part), 3, size, size, device=stage.device),
            caption=[request.prompt for request in part],
            sample_id=seeds,
            position=torch.arange(begin, begin + len(part), device=stage.device),
            epoch=0,
            key=[f"seed {request.seed}" for request in part],
        )
        yield from to_uint8(stage.generate(batch, seeds)).cpu()


def refuse_if_cut(conditioner: Conditioner, prompt: str, key: str) -> None:
    """Raises ValueError, which says to shorten `key`, if a text encoder would not see the whole prompt."""
    for part in conditioner.modules():
        if isinstance(part, TextConditioner) and (count := part.token_count(prompt)) > part.context_length:
            kept = part.context_length - 2  # start and end marks take one token each
            unseen = part.tokenizer.decode(part.tokenizer.encode(prompt)[kept:]).strip()
            raise ValueError(
                f"the prompt {prompt!r} has {count} tokens; the text encoder takes {part.context_length} and would not "
                f"see {unseen!r}; shorten {key}"
            )


def save_image(image: Tensor, path: Path, settings: dict[str, object]) -> None:
    """Write (3, H, W) bytes as a PNG whose text fields hold the settings."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_text(name, str(value))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, "PNG", pnginfo=info)
