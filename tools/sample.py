"""Generate images from prompts with a trained latent diffusion model, with or without a LoRA.

    python tools/sample.py --checkpoint runs/demo/default/checkpoints/last.ckpt --prompt "red apple, a fruit food emoji"
    python tools/sample.py --checkpoint ... --prompts-file prompts.txt --per-prompt 4 --guidance 5 --output pictures/
    python tools/sample.py --checkpoint ... --prompt "..." --lora runs/demo_lora/default/lora/adapters.safetensors
    python tools/sample.py --checkpoint ... --prompt "..." --sampler dpm_solver --steps 15 --negative "a face"
    python tools/sample.py --checkpoint ... --prompt "..." --image photo.png --strength 0.6
    python tools/sample.py --checkpoint ... --prompt "..." --image photo.png --mask hole.png
    python tools/sample.py --checkpoint ... --label 3 --label 7 --per-prompt 8

The checkpoint is one of stage 2 or of a LoRA run; averaged weights are taken where it has them. Image i is made from
the seed `--seed` + i, whatever the batch. Each is a PNG that says in its text fields how it was made; `grid.png` shows
the first 64 with their prompts.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.callbacks.checkpoints import adapters_in
from ldm_train.callbacks.drawing import Tile, captioned_grid
from ldm_train.checkpoint import digest
from ldm_train.conditioning import (
    Conditioner,
    DegradedImageConditioner,
    LabelConditioner,
    MaskConditioner,
    SemanticMapConditioner,
    TextConditioner,
)
from ldm_train.config import load_run
from ldm_train.data.transforms import center_square, decode_rgb
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
from ldm_train.nn import adapted_layers, adapter_names, attach_adapters, set_multiplier
from ldm_train.stages import LatentDiffusion, LoRAFineTuning, Original
from ldm_train.stages.lora import OF_TRAINING, adaptable_networks

SHOWN = 64  # images on the grid
SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "ddpm": DDPMSampler,
    "euler": EulerSampler,
    "heun": HeunSampler,
    "dpm_solver": DPMSolverSampler,
}


@dataclass(frozen=True)
class Request:
    """One image to make: of a prompt, and of a class where there are classes."""

    prompt: str
    seed: int
    label: int | None = None

    @property
    def caption(self) -> str:
        """What the image is of, for people."""
        return self.prompt if self.label is None else f"class {self.label} {self.prompt}".strip()


def load_stage(checkpoint: Path) -> tuple[LatentDiffusion, int]:
    """The stage of a checkpoint, and the side of its images.

    Raises:
        ValueError: if it is no stage that generates from noise.
    """
    stage, cfg = load_run(checkpoint)
    if not isinstance(stage, LatentDiffusion):
        raise ValueError(
            f"{checkpoint} is of the run {cfg.name!r}, whose stage {type(stage).__name__} does not generate; allowed "
            "are checkpoints of stage 2 or of a LoRA run; change --checkpoint"
        )
    return stage, int(cfg.image_size)


def set_sampling(stage: LatentDiffusion, arguments: argparse.Namespace) -> None:
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
    scale = guidance.scale if arguments.guidance is None else arguments.guidance
    stage.guidance = ClassifierFreeGuidance(scale, guidance.rescale, guidance.interval)


def add_lora(stage: LatentDiffusion, path: Path, console: Console) -> None:
    """Put the adapters of a file into the stage's network; warn if they were trained on another base model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be used with this stage.
    """
    if isinstance(stage, LoRAFineTuning):
        raise ValueError("the checkpoint has adapters of its own; allowed is a checkpoint of stage 2; drop --lora")
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA at {path}; allowed is a file of a LoRA run, lora/*.safetensors; see --lora")
    try:
        with safe_open(path, framework="pt") as file:
            base = (file.metadata() or {}).get("base", "")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); change --lora") from error
    if base != (own := digest(stage, without=OF_TRAINING)):
        trained_on = f"on the base model {base[:12]}" if base else "on a base model it does not name"
        warn(console, f"{path} was trained {trained_on}, this one is {own[:12]}: the pictures may be poor")
    try:
        attach_adapters(adaptable_networks(stage), path.stem.replace(".", "_"), adapters_in(state))
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model of --checkpoint: {error}") from error


def scale_lora(stage: LatentDiffusion, scale: float) -> None:
    """Multiply what the adapters add; 0 is the base model.

    Raises:
        ValueError: if there is no adapter to scale.
    """
    networks = adaptable_networks(stage)
    names = adapter_names(networks)
    if not names and scale != 1.0:
        raise ValueError(f"--lora-scale is {scale}, but there is no adapter; allowed is 1; give --lora as well")
    for name in names:
        set_multiplier(networks, name, scale)


def check_conditions(conditioner: Conditioner, arguments: argparse.Namespace) -> None:
    """Raises ValueError if the model is conditioned on what was not given, or not on what was."""
    kinds = {type(part) for part in conditioner.modules()}
    if SemanticMapConditioner in kinds:
        raise ValueError(
            "the model is conditioned on semantic maps, which this tool does not take; allowed are the other kinds; "
            "see the run's own samples (`task=validate` makes new ones)"
        )
    if (LabelConditioner in kinds) != bool(arguments.label):
        found = "no class is given to a class-conditional model" if not arguments.label else "the model takes no class"
        raise ValueError(f"{found}; allowed is --label with models that were trained on classes; change --label")
    if {DegradedImageConditioner, MaskConditioner} & kinds and arguments.image is None:
        raise ValueError(
            "the model is conditioned on an image; allowed is one to degrade or to fill; give --image, with "
            "--strength 1 or --mask"
        )


def refuse_if_cut(conditioner: Conditioner, prompt: str) -> None:
    """Raises ValueError if a text encoder would not see the whole prompt."""
    for part in conditioner.modules():
        if isinstance(part, TextConditioner) and (count := part.token_count(prompt)) > part.context_length:
            kept = part.context_length - 2  # start and end marks take one token each
            unseen = part.tokenizer.decode(part.tokenizer.encode(prompt)[kept:]).strip()
            raise ValueError(
                f"the prompt {prompt!r} has {count} tokens; the text encoder takes {part.context_length} and would not "
                f"see {unseen!r}; shorten --prompt"
            )


def read_square(path: Path, size: int, option: str) -> Tensor:
    """The middle of a picture: (3, size, size) in [-1, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}; allowed is a file; change {option}")
    try:
        pixels = decode_rgb(path.read_bytes(), max_pixels=1 << 28)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); allowed is a picture; change {option}") from error
    return center_square(pixels, size).float() / 127.5 - 1.0


def original(arguments: argparse.Namespace, size: int) -> Original | None:
    """What generation begins with: one image, and the mask of what of it must stay.

    Raises:
        FileNotFoundError: if a picture is not there.
        ValueError: if it is none, or a strength or a mask has no image to be of.
    """
    if arguments.image is None:
        if arguments.mask is not None or arguments.strength is not None:
            raise ValueError("--mask or --strength is given without a picture; allowed with one; give --image")
        return None
    hole = None if arguments.mask is None else read_square(arguments.mask, size, "--mask").mean(0, keepdim=True) > 0.0
    known = None if hole is None else (~hole).float()
    strength = (1.0 if known is not None else 0.6) if arguments.strength is None else arguments.strength
    return Original(read_square(arguments.image, size, "--image"), strength, known)


def generate(
    stage: LatentDiffusion,
    size: int,
    requests: list[Request],
    batch_size: int,
    negative: str | None = None,
    start: Original | None = None,
) -> Iterator[Tensor]:
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
        if part[0].label is not None:
            batch["label"] = torch.tensor([request.label for request in part], device=stage.device)
        away = None if negative is None else batch | {"caption": [negative] * len(part)}
        yield from to_uint8(stage.generate(batch, seeds, away, repeated(start, len(part), stage.device))).cpu()


def repeated(start: Original | None, count: int, device: torch.device) -> Original | None:
    """The one image and mask, `count` times."""
    if start is None:
        return None
    image, known = (
        None if entry is None else entry.to(device).expand(count, *entry.shape) for entry in (start.image, start.known)
    )
    assert image is not None
    return Original(image, start.strength, known)


def save_image(image: Tensor, path: Path, settings: dict[str, object]) -> None:
    """Write (3, H, W) bytes as a PNG whose text fields hold the settings."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_text(name, str(value))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, pnginfo=info)


def sample(arguments: argparse.Namespace, console: Console) -> None:
    """Run the tool.

    Raises:
        ValueError: if something is asked for that cannot be.
        FileNotFoundError: if a file that it names is not there.
    """
    prompts = [*arguments.prompt, *read_prompts(arguments.prompts_file)]
    stage, size = load_stage(arguments.checkpoint)
    check_conditions(stage.conditioner, arguments)
    set_sampling(stage, arguments)
    start = original(arguments, size)
    if arguments.lora is not None:
        add_lora(stage, arguments.lora, console)
    scale_lora(stage, arguments.lora_scale)
    for prompt in [*prompts, *([] if arguments.negative is None else [arguments.negative])]:
        refuse_if_cut(stage.conditioner, prompt)
    stage = stage.to(arguments.device).eval()
    wanted = list(itertools.product(prompts or [""], arguments.label or [None], range(arguments.per_prompt)))
    requests = [Request(prompt, arguments.seed + i, label) for i, (prompt, label, _) in enumerate(wanted)]
    shared = settings_of(stage, arguments, start)
    if adapted_layers(stage):
        shared |= {"lora": arguments.lora or "in the checkpoint", "lora_scale": arguments.lora_scale}
    arguments.output.mkdir(parents=True, exist_ok=True)
    tiles = []
    images = generate(stage, size, requests, arguments.batch, arguments.negative, start)
    for i, image in enumerate(track(images, "images", len(requests), console=console)):
        settings = {"prompt": requests[i].caption, "seed": requests[i].seed, **shared}
        save_image(image, arguments.output / f"{i:05d}.png", settings)
        tiles += [Tile(image, requests[i].caption)] if i < SHOWN else []
    title = ", ".join(f"{name} {value}" for name, value in shared.items())
    captioned_grid(tiles, title, columns=min(8, len(tiles))).save(arguments.output / "grid.png")


def settings_of(stage: LatentDiffusion, arguments: argparse.Namespace, start: Original | None) -> dict[str, object]:
    """What all images have in common, for people to read."""
    settings: dict[str, object] = {
        "checkpoint": arguments.checkpoint,
        "sampler": next(name for name, kind in SAMPLERS.items() if type(stage.sampler) is kind),
        "steps": stage.sampler.num_steps,
        "guidance": stage.guidance.scale,
    }
    settings |= {name: getattr(stage.sampler, name) for name in ("eta", "churn") if hasattr(stage.sampler, name)}
    if arguments.negative is not None:
        settings["negative"] = arguments.negative
    if start is not None:
        settings |= {"image": arguments.image, "strength": start.strength}
        settings |= {} if arguments.mask is None else {"mask": arguments.mask}
    return settings


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a UTF-8 file that are not empty.

    Raises:
        ValueError: if there is none.
    """
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); allowed is a UTF-8 text; change --prompts-file") from error
    if not any(lines):
        raise ValueError(f"{path} holds no prompt; allowed is one a line; change --prompts-file")
    return [line for line in lines if line]


def warn(console: Console, text: str) -> None:
    """Say what is wrong but no reason to stop."""
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of stage 2 or of a LoRA run")
    add("--prompt", action="append", default=[], help="what the picture shows; may be repeated")
    add("--prompts-file", type=Path, help="a text file with one prompt a line")
    add("--label", type=int, action="append", default=[], help="a class, where the model takes one; may be repeated")
    add("--lora", type=Path, help="adapters of a LoRA run (.safetensors)")
    add("--lora-scale", type=float, default=1.0, help="how much of them: 0 none, 1 as trained (default: %(default)s)")
    add("--steps", type=positive, help="denoising steps (default: as in the run's config)")
    add("--sampler", choices=list(SAMPLERS), help="(default: as in the run's config)")
    add("--negative", help="what the pictures should not show; needs a guidance scale other than 1")
    add("--image", type=Path, help="a picture to begin with")
    add("--strength", type=float, help="how much of it is given up, up to 1 (default: 0.6, with --mask 1)")
    add("--mask", type=Path, help="a picture that is white where something new is wanted; all else stays")
    add("--guidance", type=float, help="classifier-free guidance scale, 1 is none (default: as in the run's config)")
    add("--eta", type=float, help="0 DDIM to 1 ancestral (default: as in the run's config)")
    add("--seed", type=int, default=0, help="of the first image; the i-th after it has seed + i (default: %(default)s)")
    add("--per-prompt", type=positive, default=1, help="images for each prompt (default: %(default)s)")
    add("--batch", type=positive, default=16, help="images made at a time (default: %(default)s)")
    add("--output", type=Path, help="folder (default: `generated` in the run's directory); PNGs in it are replaced")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="what this machine has (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.prompt and not arguments.label and arguments.prompts_file is None:
        parser.error("no prompt; allowed are any number of them; give --prompt, --prompts-file or --label")
    if arguments.output is None:
        arguments.output = arguments.checkpoint.absolute().parents[1] / "generated"
    return arguments


def main(argv: list[str] | None = None) -> int:
    """0, or 2 if something cannot be used."""
    arguments = parse(argv)
    console = Console(stderr=True)
    try:
        sample(arguments, console)
    except (ValueError, FileNotFoundError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(f"images and grid.png in {arguments.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
