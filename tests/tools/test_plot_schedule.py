"""The pictures of the diffusion process."""

import numpy as np
import plot_schedule
import pytest
import torch
from PIL import Image


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
    assert Image.open(tmp_path / "reverse.png").width > 2 * 96


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


def test_the_same_noise_is_in_every_row():
    image = torch.zeros(3, 8, 8)
    schedules = {"a": plot_schedule.schedule_of("cosine"), "b": plot_schedule.schedule_of("linear")}
    once, again = (np.asarray(plot_schedule.forward_chain(schedules, image, 2)) for _ in range(2))
    assert np.array_equal(once, again)
