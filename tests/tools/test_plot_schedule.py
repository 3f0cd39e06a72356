"""The pictures of the diffusion process."""

import numpy as np
import plot_schedule
import pytest
import torch
from PIL import Image

from ldm_train.config import load_run
from ldm_train.metrics import to_uint8

OUTLINE = (0xD0, 0xD0, 0xD0)


def tiles_of(sheet, shape, side):
    """The pictures of a sheet of (rows, columns), found by their outlines: (rows, columns, side, side, 3)."""
    rows, columns = shape
    outline = (np.asarray(sheet.convert("RGB")) == OUTLINE).all(axis=-1)
    # Only outlines run along whole tiles, which are 96 pixels wide and high.
    xs, ys = (np.flatnonzero(outline.sum(axis=axis) >= 96 * count) for axis, count in ((0, rows), (1, columns)))
    assert (xs.size, ys.size) == (2 * columns, 2 * rows)
    pixels = np.asarray(sheet.convert("RGB"))
    return np.stack(
        [
            [
                pixels[top + 1 : bottom, left + 1 : right][:: 96 // side, :: 96 // side]
                for left, right in xs.reshape(-1, 2)
            ]
            for top, bottom in ys.reshape(-1, 2)
        ]
    )


def test_a_schedule_is_an_option_with_its_keys():
    plain = plot_schedule.schedule_of("scaled_linear")
    changed = plot_schedule.schedule_of("scaled_linear,num_steps=10,zero_terminal_snr=true")
    assert (plain.num_steps, changed.num_steps) == (1000, 10)
    assert changed.has_zero_terminal_snr


def test_the_forward_chain_begins_with_the_image_and_ends_in_noise(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = (250, 10, 10)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image = ["--image", str(tmp_path / "image.png"), "--size", "96"]
    plot_schedule.main(["cosine", *image, "--steps", "2", "--output", str(tmp_path / "out")])
    sheet = np.asarray(Image.open(tmp_path / "out" / "forward.png").convert("RGB")).astype(float)
    red = (sheet[:, :, 0] > 220) & (sheet[:, :, 1] < 60) & (sheet[:, :, 2] < 60)
    columns = red.sum(axis=0)
    left, right = columns[: columns.size // 2 + 20], columns[columns.size // 2 + 20 :]
    assert left.max() > 80  # the image's red half, nearly untouched
    assert right.max() < 30
    assert (tmp_path / "out" / "schedules.png").is_file()


def test_the_reverse_chain_ends_with_what_the_stage_generates(tiny_runs, tmp_path):
    checkpoint = tiny_runs / "demo" / "default" / "checkpoints" / "last.ckpt"
    prompts = ["--prompt", "red apple", "--prompt", "blue heart"]
    plot_schedule.main(["cosine", "--checkpoint", str(checkpoint), *prompts, "--output", str(tmp_path)])
    stage, cfg = load_run(checkpoint)
    ids = torch.arange(2)
    batch = {"image": torch.zeros(2, 3, cfg.image_size, cfg.image_size), "caption": ["red apple", "blue heart"]}
    generated = to_uint8(stage.generate({**batch, "sample_id": ids, "position": ids, "epoch": 0}, ids))
    columns = min(8, stage.sampler.num_steps)
    tiles = tiles_of(Image.open(tmp_path / "reverse.png"), (4, columns), cfg.image_size)
    for states, estimates, image in zip(tiles[::2], tiles[1::2], generated, strict=True):
        # A picture decoded alone and one decoded in a batch may round differently.
        np.testing.assert_allclose(states[-1].astype(int), image.permute(1, 2, 0), atol=1)
        assert np.array_equal(estimates[-1], states[-1])  # the last step leads to its estimate
        assert np.abs(states[0].astype(int) - states[-1]).max() > 1  # else the order could not be seen


def test_rows_of_the_forward_chain_differ_by_their_schedule_alone():
    """There is one noise that makes every tile of the image."""
    image = torch.linspace(-0.5, 0.5, 8, dtype=torch.float64).expand(3, 8, 8)
    schedules = {name: plot_schedule.schedule_of(name) for name in ("cosine", "linear", "scaled_linear")}
    sheet = plot_schedule.forward_chain(schedules, image.float(), 4)
    x_t = torch.tensor(tiles_of(sheet, (3, 4), 8)).double().permute(0, 1, 4, 2, 3)
    times = torch.linspace(0, 999, 4).round().long()
    alpha, sigma = (
        torch.stack([getattr(schedule, scale)[times] for schedule in schedules.values()]).view(3, 4, 1, 1, 1)
        for scale in ("alpha", "sigma")
    )
    # A byte leaves its rounding open, and at an end of the range everything beyond.
    least, most = (((x_t + rounding) / 127.5 - 1 - alpha * image) / sigma for rounding in (-0.51, 0.51))
    least = least.masked_fill(x_t == 0, -torch.inf).amax(dim=(0, 1))
    most = most.masked_fill(x_t == 255, torch.inf).amin(dim=(0, 1))
    assert bool((least <= most).all())
    assert float(((least + most) / 2).std()) > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quadratic"], "there is no schedule 'quadratic'; allowed are cosine, "),
        (["cosine", "--image", "absent.png"], "no image at absent.png"),
        (["cosine", "--steps", "1"], "allowed are 2 steps"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plot_schedule.main([*arguments, "--output", str(tmp_path)])
