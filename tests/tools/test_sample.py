"""`tools/sample.py`: an image follows from the weights, the prompt, the settings and its own seed alone."""

from pathlib import Path

import numpy as np
import pytest
import sample
from PIL import Image
from safetensors.torch import save_file

from ldm_train.train import train
from tests.conftest import composed
from tests.tools.drawn import PROMPTS, checkpoint, pixels, run


def test_an_image_does_not_depend_on_the_batch(draw):
    together, alone = pixels(draw("together", "--batch", 3)), pixels(draw("alone", "--batch", 1))
    assert together.shape == (3, 32, 32, 3)
    assert np.abs(together - alone).max() <= 1  # sums of floats in another order


def test_the_same_command_gives_the_same_bytes_and_another_seed_another_image(draw):
    once, again = draw("once", prompts=PROMPTS[:1]), draw("again", prompts=PROMPTS[:1])
    assert (once / "00000.png").read_bytes() == (again / "00000.png").read_bytes()
    assert np.abs(pixels(once) - pixels(draw("other", "--seed", 1, prompts=PROMPTS[:1]))).mean() > 1


def test_the_seed_of_an_image_is_the_first_seed_and_its_number(draw):
    both = pixels(draw("both", "--seed", 6, "--per-prompt", 2, "--batch", 1, prompts=PROMPTS[:1]))
    second = pixels(draw("second", "--seed", 7, prompts=PROMPTS[:1]))
    assert (both[1] == second[0]).all()


def test_the_grid_shows_all_images(draw):
    folder = draw("grid")
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png", "00002.png", "grid.png"]
    shown = np.asarray(Image.open(folder / "grid.png").convert("RGB")).astype(int)
    for image in pixels(folder):
        large = image.repeat(3, axis=0).repeat(3, axis=1)  # 96 pixels a tile
        corners = np.argwhere((shown == large[0, 0]).all(-1))
        fits = [(y, x) for y, x in corners if shown[y : y + 96, x : x + 96].shape == large.shape]
        assert any((shown[y : y + 96, x : x + 96] == large).all() for y, x in fits)


def test_prompts_come_from_a_file_as_well(draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[1:], "", ""]), encoding="utf-8")
    folder = draw("file", "--prompts-file", tmp_path / "prompts.txt", prompts=PROMPTS[:1])
    assert [Image.open(path).text["prompt"] for path in sorted(folder.glob("0*.png"))] == list(PROMPTS)


@pytest.mark.parametrize(("length", "unseen"), [(22, "yellow sun"), (21, "sun")])
def test_a_prompt_that_the_encoder_would_cut_is_refused(tiny_runs, tmp_path, capsys, length, unseen):
    long = "very " * length + "yellow sun"
    arguments = ["--checkpoint", checkpoint(tiny_runs, "demo"), "--prompt", long, "--output", tmp_path / "long"]
    assert sample.main([str(x) for x in arguments]) == 2
    error = capsys.readouterr().err
    assert f"has {length + 4} tokens; the text encoder takes 24 and would not see '{unseen}'; shorten --prompt" in error
    assert not (tmp_path / "long").exists()
    assert draw_longest(tiny_runs, tmp_path, "very " * 20 + "yellow sun") == 0


def draw_longest(runs, folder, prompt):
    arguments = [
        "--checkpoint",
        checkpoint(runs, "demo"),
        "--prompt",
        prompt,
        "--steps",
        1,
        "--output",
        folder / "fits",
    ]
    return sample.main([str(x) for x in arguments])


@pytest.mark.parametrize("kind", sample.SAMPLERS)
def test_every_sampler_draws_and_is_named_in_the_picture(draw, kind):
    folder = draw(kind, "--sampler", kind, prompts=PROMPTS[:1])
    assert Image.open(folder / "00000.png").text["sampler"] == kind


def test_a_negative_prompt_steers_away_and_the_empty_one_is_none(draw):
    strong = ["--guidance", 1000]  # the model has seen little, and hardly hears its captions
    plain, empty = pixels(draw("plain", *strong)), pixels(draw("empty", *strong, "--negative", ""))
    away = pixels(draw("away", *strong, "--negative", PROMPTS[1]))
    assert (plain == empty).all()
    assert np.abs(plain - away).mean() > 1


def test_an_image_is_kept_where_the_mask_is_black_and_the_more_the_lower_the_strength(draw, tmp_path):
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16] = (200, 30, 30)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    begin = ["--image", tmp_path / "picture.png"]
    filled = pixels(draw("filled", *begin, "--mask", tmp_path / "mask.png"))
    assert (filled[:, :, :16] == picture[:, :16]).all()
    assert (filled[:, :, 16:] != picture[:, 16:]).any()
    distances = []
    for strength in (0.1, 0.5, 1.0):
        drawn = pixels(draw(f"s{strength}", *begin, "--strength", strength, "--steps", 10))
        distances.append(np.abs(drawn - pixels(draw("one", "--steps", 10))).mean())
    assert distances[0] > distances[1] > distances[2] == 0  # at full strength the picture is forgotten


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask", "mask.png"], "give --image"),
        (["--image", "absent.png"], "error: no picture at absent.png; allowed is a file; change --image"),
        (["--seed", "1" + 20 * "0"], "seed of an image is 100000000000000000000; allowed are -92"),
        (["--sampler", "euler", "--eta", "0.5"], "allowed with --sampler ddim"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_runs, tmp_path, capsys, options, message):
    arguments = [
        "--checkpoint",
        str(checkpoint(tiny_runs, "demo")),
        "--prompt",
        "x",
        "--output",
        str(tmp_path),
        *options,
    ]
    assert sample.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_used_is_named_with_what_can(tiny_runs, tmp_path, capsys):
    demo = checkpoint(tiny_runs)
    for name in ("text.ckpt", "text.safetensors"):
        (tmp_path / name).write_text("no tensors")
    save_file({}, tmp_path / "empty.safetensors")
    cases = (
        ([tmp_path / "none.ckpt"], "no checkpoint at", "--checkpoint"),
        ([tmp_path / "text.ckpt"], "cannot be read as a checkpoint", "--checkpoint"),
        ([checkpoint(tiny_runs, "demo_autoencoder")], "stage AutoencoderStage does not generate", "--checkpoint"),
        ([demo, "--lora", tmp_path / "none.safetensors"], "no adapters for --lora", "allowed"),
        ([demo, "--lora", tmp_path / "text.safetensors"], "allowed is a complete safetensors file", "--lora"),
        ([demo, "--lora", tmp_path / "empty.safetensors"], "none of 0 tensors has an adapter's name", "--lora"),
        ([demo, "--raw", "--unet", "nonsense", "--override", "a.b=1"], "--override a.b=1 is no part", "--override"),
        ([demo, "--width", 36], "36 x 32 pixels", "--width"),
        ([demo, "--precision", "float16"], "--precision is float16 on the device cpu", "--precision"),
        ([demo, "--task-index", 2, "--num-tasks", 2], "--task-index is 2", "--num-tasks"),
        ([demo, "--segmentation", tmp_path / "text.ckpt"], "takes no semantic map", "--segmentation"),
        ([demo, "--steps", 5000], "num_steps is 5000", "num_steps"),
        ([demo, "--eta", 2], "eta is 2", "eta"),
        ([demo, "--prompts-file", tmp_path / "none.txt"], "cannot be read", "--prompts-file"),
    )
    for options, found, key in cases:
        arguments = ["--checkpoint", *options, "--prompt", "a", "--output", tmp_path / "out"]
        assert sample.main([str(argument) for argument in arguments]) == 2, options
        message = capsys.readouterr().err
        assert found in message, options
        assert "allowed" in message or "--" in message, options
        assert key in message, options
        assert not list(tmp_path.glob("out/*.png")), options


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        given = ["--checkpoint", tmp_path / "none.ckpt", "--prompt", "a", "--output", output]
        assert run(*given) == 2
        message = f"{tmp_path / 'file'} is no folder; allowed is a folder, which need not be there yet; change --output"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--guidance", "nan"], ["--guidance", "inf"], ["--lora", "file=nan"]])
def test_numbers_are_finite(options, capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--checkpoint", "x.ckpt", "--prompt", "a", *options])
    assert "allowed: finite numbers" in capsys.readouterr().err


def test_a_prompt_is_needed(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint", "x.ckpt"])
    assert "give --prompt, --prompts-file or --label" in capsys.readouterr().err


@pytest.fixture(scope="module")
def conditioned(tiny_runs, tmp_path_factory):
    """Trains one of the demo's kinds of conditions for two steps; its checkpoint."""

    def run(experiment: str) -> Path:
        root = tmp_path_factory.mktemp(experiment)
        overrides = [f"stage.autoencoder.checkpoint={checkpoint(tiny_runs, 'demo_autoencoder')}", "logger=none"]
        overrides += ["debug=tiny", "callbacks.samples=null", "trainer.max_steps=2"]
        train(composed(f"experiment={experiment}", *overrides, root=root))
        return checkpoint(root, experiment)

    return run


def test_classes_take_the_place_of_prompts(conditioned, tmp_path, capsys):
    given = ["--checkpoint", str(conditioned("demo_class")), "--steps", "2"]
    both, alone = [*given, "--label", "0", "--label", "3"], [*given, "--label", "3", "--seed", "1"]
    for folder, arguments in (("both", both), ("alone", alone)):
        assert sample.main([*arguments, "--output", str(tmp_path / folder)]) == 0
    assert (pixels(tmp_path / "both")[1] == pixels(tmp_path / "alone")[0]).all()
    assert Image.open(tmp_path / "both" / "00001.png").text["prompt"] == "class 3"
    assert sample.main([*given, "--prompt", "a", "--output", str(tmp_path / "out")]) == 2
    assert "change --label" in capsys.readouterr().err


def test_semantic_maps_are_followed(conditioned, tmp_path, capsys):
    """The middle of a map that is wider than the image, and only classes that the model knows."""
    numbers = np.random.default_rng(0).integers(0, 4, (16, 32)).astype(np.uint8)
    maps = {"wide": numbers, "square": numbers[:, 8:24], "other": numbers[:, :16], "wrong": numbers + 200}
    # Trained for two steps, the model hardly looks at its maps: it is made to.
    given = ["--checkpoint", conditioned("demo_semantic"), "--prompt", "a", "--steps", 2, "--raw", "--guidance", 1000]
    for name, values in maps.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        code = run(*given, "--segmentation", tmp_path / f"{name}.png", "--output", tmp_path / name)
        assert code == (2 if name == "wrong" else 0)
    assert "holds the value 203; allowed are 0 to" in capsys.readouterr().err
    wide, square, other = (pixels(tmp_path / name) for name in ("wide", "square", "other"))
    assert (wide == square).all()
    assert (wide != other).any()


@pytest.mark.parametrize(
    ("experiment", "message"),
    [("demo_semantic", "change --segmentation"), ("demo_superres", "give --image"), ("demo_inpaint", "give --image")],
)
def test_a_condition_that_is_not_given_is_asked_for(experiment, message, conditioned, tmp_path, capsys):
    given = ["--checkpoint", str(conditioned(experiment)), "--prompt", "a", "--output", str(tmp_path / "out")]
    assert sample.main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures_go_beside_the_run_by_default():
    assert sample.parse(["--checkpoint", "runs/demo/default/checkpoints/last.ckpt", "--prompt", "a"]).output == (
        Path.cwd() / "runs/demo/default/generated"
    )
