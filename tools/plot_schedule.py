"""Draw noise schedules, and what they do to an image: forwards into noise, backwards out of it.

    python tools/plot_schedule.py linear scaled_linear cosine
    python tools/plot_schedule.py scaled_linear scaled_linear,zero_terminal_snr=true --image photo.jpg
    python tools/plot_schedule.py --checkpoint runs/demo/default/checkpoints/last.ckpt --prompt "red apple"

A schedule is an option of `conf/schedule`, with its keys behind commas. `schedules.png` shows alpha-bar_t, the share of
the variance that is signal, and the log of the signal-to-noise ratio, log2(alpha_t^2 / sigma_t^2); `forward.png`
x_t = alpha_t x_0 + sigma_t noise for an image, one row a schedule; `reverse.png`, with a checkpoint of stage 2 or 3,
how it makes an image of each prompt: x_t above the estimate of x_0, at even steps of its sampler.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.callbacks.drawing import Tile, labelled_rows
from ldm_train.config import conf_dir, load_run, register
from ldm_train.data.transforms import center_square, decode_rgb
from ldm_train.diffusion import NoiseSchedule, SamplerState, add_noise
from ldm_train.metrics import to_uint8
from ldm_train.randomness import Stream, normal
from ldm_train.stages import LatentDiffusion

SEED = 0


def schedule_of(description: str) -> NoiseSchedule:
    """The schedule of `option,key=value,...`.

    Raises:
        ValueError: if there is no such option or key, or it describes no schedule.
    """
    option, *changes = description.split(",")
    options = sorted(path.stem for path in (conf_dir() / "schedule").glob("*.yaml"))
    if option not in options:
        raise ValueError(f"there is no schedule {option!r}; allowed are {', '.join(options)}; change SCHEDULE")
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [f"schedule={option}", *(f"schedule.{change}" for change in changes)])
    return hydra.utils.instantiate(cfg.schedule)


def plot_schedules(schedules: dict[str, NoiseSchedule], path: Path) -> None:
    """Both curves of each schedule, over t / T."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")  # without pyplot no screen is asked for
    left, right = figure.subplots(1, 2)
    for name, schedule in schedules.items():
        time = np.arange(schedule.num_steps) / schedule.num_steps
        left.plot(time, schedule.alpha_bar.numpy(), label=name)
        ratio = schedule.signal_to_noise()
        # Without signal the logarithm has no value, and the curve ends before it.
        right.plot(time[ratio > 0], ratio[ratio > 0].log2().numpy(), label=name)
    left.set(xlabel="t / T", ylabel=r"$\bar\alpha_t = \alpha_t^2$", title="signal left")
    right.set(xlabel="t / T", ylabel=r"$\log_2 (\alpha_t^2 / \sigma_t^2)$", title="signal to noise")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=110)


def forward_chain(schedules: dict[str, NoiseSchedule], image: Tensor, count: int) -> Image.Image:
    """x_t of one image (3, H, W) in [-1, 1] at evenly spread times, with the same noise in each row."""
    noise = normal(SEED, 0, torch.zeros(1, dtype=torch.int64), Stream.NOISE, tuple(image.shape))
    rows = []
    for schedule in schedules.values():
        times = torch.linspace(0, schedule.num_steps - 1, count).round().long()
        noisy = [add_noise(schedule, image[None], noise, t[None])[0] for t in times]
        texts = [f"t = {t}, alpha-bar {schedule.alpha_bar[t]:.3g}" for t in times]
        rows.append([Tile(to_uint8(x), text) for x, text in zip(noisy, texts, strict=True)])
    return labelled_rows(rows, list(schedules), "Forwards: x_t = alpha_t x_0 + sigma_t noise")


def reverse_chain(stage: LatentDiffusion, prompts: Sequence[str], image_size: int, count: int) -> Image.Image:
    """x_t and the estimate of x_0, decoded, on the way from noise to an image of each prompt."""
    ids = torch.arange(len(prompts))
    batch = ImageTextBatch(
        image=torch.zeros(len(prompts), 3, image_size, image_size),
        caption=list(prompts),
        sample_id=ids,
        position=ids,
        epoch=0,
        key=list(prompts),
    )
    states: list[SamplerState] = []
    stage.generate(batch, ids, watch=states.append)
    shown = [states[round(i)] for i in torch.linspace(0, len(states) - 1, min(count, len(states))).tolist()]
    rows, labels = [], []
    for i, prompt in enumerate(prompts):
        for kind, name in (("x_t", "x_t"), ("x_0", "estimate of x_0")):
            tiles = []
            for state in shown:
                with torch.no_grad():
                    decoded = stage.autoencoder.decode(getattr(state, kind)[i : i + 1])
                noise = f"t = {state.t}" if state.t >= 0 else "data"
                tiles.append(Tile(to_uint8(decoded)[0], noise if kind == "x_t" else ""))
            rows.append(tiles)
            labels.append(f"{prompt}: {name}" if kind == "x_t" else name)
    return labelled_rows(rows, labels, "Backwards: from noise to data, decoded")


def read_image(path: Path | None, size: int) -> Tensor:
    """A square image (3, size, size) in [-1, 1]; two soft discs if no file is named.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image.
    """
    if path is None:
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, size),) * 2, indexing="ij")
        discs = [((x - a).square() + (y - b).square()).sqrt() for a, b in ((-0.3, -0.2), (0.35, 0.3))]
        red, blue = (torch.sigmoid((0.45 - disc) * 30) for disc in discs)
        return torch.stack([1 - blue, 1 - red - blue + red * blue, 1 - red]) * 2 - 1
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}; allowed is a picture file; change --image")
    try:
        pixels = decode_rgb(path.read_bytes(), max_pixels=1 << 28)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); allowed is a picture; change --image") from error
    return center_square(pixels, size).float() / 127.5 - 1.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw noise schedules and what they do to an image.")
    parser.add_argument("schedules", nargs="*", metavar="SCHEDULE", help="an option of conf/schedule[,key=value,...]")
    parser.add_argument("--image", type=Path, help="what the forward chain begins with")
    parser.add_argument("--size", type=int, default=128, help="pixels of the forward chain's image")
    parser.add_argument("--steps", type=int, default=8, help="pictures of a chain")
    parser.add_argument("--checkpoint", type=Path, help="of stage 2 or 3, for the reverse chain")
    parser.add_argument("--prompt", action="append", default=[], help="of the reverse chain; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("schedules"), help="folder for the pictures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Draw what was asked for."""
    args = parse(arguments)
    if args.steps < 2 or args.size < 8:
        raise ValueError(
            f"--steps is {args.steps} and --size {args.size}; allowed are 2 steps and 8 pixels at least; change them"
        )
    described = args.schedules or ["linear", "scaled_linear", "scaled_linear,zero_terminal_snr=true", "cosine"]
    schedules = {description: schedule_of(description) for description in described}
    image = read_image(args.image, args.size)
    args.output.mkdir(parents=True, exist_ok=True)
    plot_schedules(schedules, args.output / "schedules.png")
    forward_chain(schedules, image, args.steps).save(args.output / "forward.png")
    written = ["schedules.png", "forward.png"]
    if args.checkpoint is not None:
        stage, cfg = load_run(args.checkpoint)
        if not isinstance(stage, LatentDiffusion):
            raise ValueError(f"{args.checkpoint} is of a stage that does not generate; change --checkpoint")
        reverse_chain(stage, args.prompt or [""], int(cfg.image_size), args.steps).save(args.output / "reverse.png")
        written.append("reverse.png")
    print("\n".join(str(args.output / name) for name in written))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
