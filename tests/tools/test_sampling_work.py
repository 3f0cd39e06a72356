"""The work of `tools/sample.py`: split, interrupted, gone on with, and done again from an image's own settings."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample
import sampling_settings
import torch
from PIL import Image
from sampling_images import arithmetic
from torch import nn

from tests.tools.drawn import PROMPTS, adapters, checkpoint, fields, pixels, run

SETTINGS = {
    "version": sampling_settings.VERSION,
    **{"prompt": "a", "negative": None, "seed": 0, "label": None},
    "model": {"checkpoint": "none.ckpt", "title": "none", "sha256": "", "told": {}},
    **{"lora": [], "height": 32, "width": 32, "sampler": {"kind": "ddim", "steps": 2, "eta": 0.0}},
    **{"guidance": {"scale": 2.0}, "precision": "float32", "strength": None},
    **{"image": None, "mask": None, "segmentation": None, "made": {"row": 0, "batch": 1, "device": "cpu"}},
}
"""Of an image of 32 x 32 pixels, as far as `--again` relies on them."""


def lines(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


def prompts_and_seeds(folder):
    found = [fields(path) for path in sorted(folder.glob("0*.png"))]
    return [(text["prompt"], int(text["seed"])) for text in found]


class TestSplits:
    @pytest.mark.parametrize(("tasks", "world", "batch"), [(1, 3, 1), (3, 1, 2), (2, 2, 16)])
    def test_images_are_the_same_however_they_are_split(self, tasks, world, batch, draw, monkeypatch):
        whole = draw("whole", "--per-prompt", 2)
        options = ["--per-prompt", 2, "--batch", batch, "--num-tasks", tasks]
        for task in range(tasks):
            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                monkeypatch.setenv("WORLD_SIZE", str(world))
                assert not (whole.parent / "parts" / "grid.png").exists()  # whoever finishes last draws it
                parts = draw("parts", *options, "--task-index", task)
        assert prompts_and_seeds(parts) == prompts_and_seeds(whole)
        assert np.abs(pixels(parts) - pixels(whole)).max() <= 1  # sums of floats in another order
        assert (parts / "grid.png").exists()

    def test_one_image_at_a_time_is_the_same_bit_for_bit(self, draw, monkeypatch):
        whole = draw("whole", "--batch", 1)
        for task in (1, 0):
            parts = draw("parts", "--batch", 1, "--task-index", task, "--num-tasks", 2)
        assert (pixels(parts) == pixels(whole)).all()

    @pytest.mark.slow
    def test_torchrun_starts_it(self, tiny_runs, tmp_path):
        tool = Path(sample.__file__)
        given = ["--checkpoint", checkpoint(tiny_runs), "--steps", 2, "--device", "cpu", "--output", tmp_path / "out"]
        given += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, tool]
        subprocess.run([str(word) for word in [*launcher, *given]], check=True, timeout=300)
        assert sorted(path.name for path in (tmp_path / "out").iterdir())[:3] == ["00000.png", "00001.png", "00002.png"]


class TestGoingOn:
    def test_the_job_s_script_is_told_how_many_images_are_there(self, draw, tmp_path, monkeypatch):
        told = tmp_path / "17"
        monkeypatch.setenv("LDM_START_FILE", str(told))
        folder = draw("out", "--per-prompt", 2)
        made = sorted(folder.glob("0*.png"))
        assert told.read_text() == f"{len(made)}\n"
        made[0].unlink()
        monkeypatch.setattr(sample, "generate", lambda *_: iter(()))
        draw("out", "--per-prompt", 2)
        assert told.read_text() == f"{len(made) - 1}\n"

    def test_images_made_anew_are_no_progress(self, draw, tmp_path, monkeypatch):
        """Another start begins with the first again."""
        draw("out", "--per-prompt", 2)
        monkeypatch.setenv("LDM_START_FILE", str(tmp_path / "17"))
        draw("out", "--per-prompt", 2, "--overwrite")
        assert (tmp_path / "17").read_text() == "0\n"

    def test_what_is_there_is_kept_and_the_rest_is_made(self, draw, capsys):
        folder = draw("out")
        before = pixels(folder)
        (folder / "00001.png").unlink()
        kept = (folder / "00000.png").stat().st_mtime_ns
        capsys.readouterr()
        draw("out")
        assert "2 of 3 images are there already" in capsys.readouterr().err
        assert np.abs(pixels(folder) - before).max() <= 1
        assert (folder / "00000.png").stat().st_mtime_ns == kept

    @pytest.mark.parametrize("options", [["--seed", "1"], ["--guidance", "5"], ["--negative", "a face"], ["--raw"]])
    def test_other_images_are_replaced_only_if_that_is_said(self, options, draw, tiny_runs, tmp_path, capsys):
        folder = draw("out", prompts=PROMPTS[:1])
        before = (folder / "00000.png").read_bytes()
        given = ["--checkpoint", checkpoint(tiny_runs), "--prompt", PROMPTS[0], "--steps", 2, *options]
        assert run(*given, "--output", folder) == 2
        assert "images of other settings, the first is 00000.png" in capsys.readouterr().err
        assert (folder / "00000.png").read_bytes() == before
        assert run(*given, "--output", folder, "--overwrite") == 0
        assert (folder / "00000.png").read_bytes() != before

    def test_a_damaged_image_is_none_of_this_command(self, draw, tiny_runs, capsys):
        folder = draw("out", prompts=PROMPTS[:1])
        (folder / "00000.png").write_bytes(b"no picture")
        given = ["--checkpoint", checkpoint(tiny_runs), "--prompt", PROMPTS[0], "--steps", 2]
        assert run(*given, "--output", folder) == 2
        assert "--overwrite" in capsys.readouterr().err

    def test_an_image_that_was_cut_off_is_made_again(self, draw, capsys):
        folder = draw("out", prompts=PROMPTS[:1])
        whole = (folder / "00000.png").read_bytes()
        (folder / "00000.png").write_bytes(whole[:-200])
        assert run("--again", folder / "00000.png") == 2
        assert "or is damaged" in capsys.readouterr().err
        draw("out", prompts=PROMPTS[:1])
        assert (folder / "00000.png").read_bytes() == whole

    def test_the_sheet_can_be_drawn_later(self, draw):
        folder = draw("out")
        sheet = (folder / "grid.png").read_bytes()
        (folder / "grid.png").unlink()
        assert run("--grid", folder) == 0
        assert (folder / "grid.png").read_bytes() == sheet
        (folder / "empty").mkdir()
        assert run("--grid", folder / "empty") == 2


class TestRequests:
    def test_lines_have_their_own_seeds_counts_and_negatives(self, draw, tmp_path):
        entries = ({"prompt": "a", "count": 2}, {"prompt": "b", "seed": 40, "count": 2}, {"prompt": "c"})
        folder = draw("out", "--prompts-file", lines(tmp_path / "p.jsonl", *entries), "--seed", 7, prompts=())
        assert prompts_and_seeds(folder) == [("a", 7), ("a", 8), ("b", 40), ("b", 41), ("c", 11)]

    def test_an_own_negative_stands_in_for_the_common_one(self, draw, tmp_path):
        strong = ["--guidance", 1000, "--batch", 3]
        entries = [{"prompt": PROMPTS[0], "seed": 0}, {"prompt": PROMPTS[0], "seed": 0, "negative": PROMPTS[1]}]
        mixed = pixels(draw("mixed", *strong, "--prompts-file", lines(tmp_path / "p", *entries), prompts=()))
        plain = pixels(draw("plain", *strong, prompts=PROMPTS[:1]))
        away = pixels(draw("away", *strong, "--negative", PROMPTS[1], prompts=PROMPTS[:1]))
        assert (mixed == np.concatenate([plain, away])).all()
        assert (plain != away).any()

    def test_each_prompt_gets_the_same_seeds(self, draw):
        assert prompts_and_seeds(draw("out", "--seeds", "5,3", prompts=("a", "b"))) == [
            ("a", 5),
            ("a", 3),
            ("b", 5),
            ("b", 3),
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"prompt": 3}', "p:1 has prompt 3; allowed are prompt (str)"),
            ('a\n{"steps": 3}', "p:2 has steps 3"),
            ('{"prompt": "a", "count": 0}', "has count 0"),
            ("{a}", "is no JSON"),
        ],
    )
    def test_lines_that_are_not_understood_are_named(self, text, message, tiny_runs, tmp_path, capsys):
        (tmp_path / "p").write_text(text)
        given = ["--checkpoint", checkpoint(tiny_runs), "--prompts-file", tmp_path / "p", "--output", tmp_path / "out"]
        assert run(*given) == 2
        assert message in capsys.readouterr().err


class TestSettings:
    def test_the_image_says_what_it_was_made_from(self, draw, tiny_runs):
        prompt = "-Grüße, ein Herz ♥"
        options = ["--seed", 3, "--guidance", 2.5, "--eta", 0.5, "--per-prompt", 2, "--negative", "a face"]
        folder = draw("out", *options, f"--prompt={prompt}", prompts=())
        found = fields(folder / "00001.png")
        shown = {key: found[key] for key in found if key not in ("ldm_train", "parameters")}
        assert shown == {
            "prompt": prompt,
            "negative": "a face",
            "seed": "4",
            "checkpoint": str(checkpoint(tiny_runs)),
            "sampler": "ddim",
            "steps": "2",
            "guidance": "2.5",
            "eta": "0.5",
        }
        digest = sampling_settings.read(folder / "00001.png")["model"]["sha256"]
        last = f"Steps: 2, Sampler: ddim, CFG scale: 2.5, Seed: 4, Size: 32x32, Model hash: {digest[:10]}, Model: demo"
        assert found["parameters"] == f"{prompt}\nNegative prompt: a face\n{last}"

    def test_an_image_is_made_again_bit_for_bit_from_itself(self, draw, tiny_runs, tmp_path, capsys):
        rng = np.random.default_rng(0)
        for name in ("picture", "mask"):
            Image.fromarray(rng.integers(0, 256, (40, 70, 3), np.uint8)).save(tmp_path / f"{name}.png")
        options = ["--lora", f"{adapters(tiny_runs)}=-0.1", "--sampler", "euler", "--width", 64, "--seeds", "9,2"]
        options += ["--image", tmp_path / "picture.png", "--mask", tmp_path / "mask.png", "--strength", 0.7]
        options += ["--precision", "bfloat16", "--negative=-a", "--prompt=-x=1"]
        folder = draw("out", *options)
        assert run("--again", folder / "00003.png") == 0
        assert "the same, bit for bit" in capsys.readouterr().err
        one, two = (sampling_settings.read(path / "00003.png") for path in (folder, folder / "again"))
        assert one == two
        assert fields(folder / "00003.png") == fields(folder / "again" / "00003.png")

    def test_what_has_changed_since_is_named(self, draw, tiny_runs, tmp_path, capsys):
        folder = draw("out", prompts=PROMPTS[:1])
        assert run("--again", folder / "00000.png", "--checkpoint", checkpoint(tiny_runs, "demo_lora")) == 2
        assert "was made from has changed since: model;" in capsys.readouterr().err
        Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
        assert run("--again", tmp_path / "plain.png") == 2
        assert "does not say how it was made" in capsys.readouterr().err

    def test_another_image_is_told_from_the_same(self, draw, capsys):
        folder = draw("out", prompts=PROMPTS[:1])
        with Image.open(folder / "00000.png") as image:
            info, other = image.info, image.copy()
        other.putpixel((3, 3), tuple(255 - value for value in other.getpixel((3, 3))))
        text = sampling_settings.PngInfo()
        text.add_text("ldm_train", info["ldm_train"])
        other.save(folder / "00000.png", pnginfo=text)
        assert run("--again", folder / "00000.png") == 1
        assert "1 pixels differ" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x.pop("made"), "says made otherwise than this tool does, or not at all; allowed are"),
            (lambda x: x["made"].update(row=1), "says made.row otherwise"),
            (lambda x: x["made"].update(row=-1), "says made.row otherwise"),
            (lambda x: x["made"].update(batch="1"), "says made.batch otherwise"),
            (lambda x: x["model"].pop("told"), "says model.told otherwise"),
            (lambda x: x["model"]["told"].update(output="elsewhere"), "says model.told.output otherwise"),
            (lambda x: x["model"]["told"].update(override="a"), "says override otherwise"),
            (lambda x: x.update(lora=[{"file": "a"}]), "says lora.sha256, lora.weight otherwise"),
            (lambda x: x.update(model=[]), "says model otherwise"),
            (lambda x: x.update(image="a.png"), "says image otherwise"),
            (lambda x: x.update(height=64), "says width and height otherwise"),
            (lambda x: x["sampler"].update(kind="magic"), "has a setting that is no option; allowed are those above"),
            (lambda x: x["guidance"].update(scale=float("nan")), "has a setting that is no option"),
        ],
    )
    def test_settings_that_this_tool_did_not_write_are_refused(self, change, message, tmp_path, capsys):
        settings = json.loads(json.dumps(SETTINGS))
        change(settings)
        text = sampling_settings.PngInfo()
        text.add_text("ldm_train", json.dumps(settings))
        Image.new("RGB", (32, 32)).save(tmp_path / "0.png", pnginfo=text)
        assert run("--again", tmp_path / "0.png") == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["0.png"]

    def test_an_image_is_never_made_over_the_one_that_it_is_compared_with(self, draw, capsys):
        folder = draw("out", prompts=PROMPTS[:1])
        before = (folder / "00000.png").read_bytes()
        (folder / "again").symlink_to(folder)
        for output in ([], ["--output", folder], ["--output", folder / "again"]):
            assert run("--again", folder / "00000.png", *output) == 2
            assert "which it is compared with; allowed is any other folder; change --output" in capsys.readouterr().err
        assert (folder / "00000.png").read_bytes() == before


class TestPrecision:
    def test_half_the_bits_change_little(self, draw):
        exact, rough = pixels(draw("exact")), pixels(draw("rough", "--precision", "bfloat16"))
        difference = np.abs(exact - rough)
        assert 0 < difference.mean() < 2

    def test_normalisations_measure_in_float32(self):
        """A mean of 1000 leaves bfloat16 no digits of a spread of 1; their difference would be lost or made up."""
        x = (1000 + 8 * torch.randint(0, 2, (1, 32, 64, 64), generator=torch.Generator().manual_seed(0))).bfloat16()
        norm = nn.GroupNorm(8, 32)
        with arithmetic("bfloat16", torch.device("cpu")):
            found = norm(x).float()
        torch.testing.assert_close(found, norm(x.float()), rtol=1e-2, atol=1e-2)


def test_a_picture_changes_the_less_the_lower_the_strength(draw, tmp_path):
    """With next to none it is what the autoencoder makes of it: the last step's noise is all that is added."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    begin = ["--image", tmp_path / "picture.png", "--steps", 100, "--guidance", 1]
    reconstructed = reconstruction(tmp_path / "picture.png", tmp_path, draw)
    far = [
        np.abs(pixels(draw(f"s{s}", *begin, "--strength", s, prompts=PROMPTS[:1])) - reconstructed).mean()
        for s in (0.01, 0.3, 0.9)
    ]
    assert far[0] < far[1] < far[2]
    assert far[0] < 8


def reconstruction(path, tmp_path, draw):
    """What the demo's autoencoder makes of a picture."""
    from sampling_images import read_picture
    from sampling_models import Source, load_model

    from ldm_train.data.crops import Shape
    from ldm_train.metrics import to_uint8

    named = Path(fields(draw("for_its_checkpoint", prompts=PROMPTS[:1]) / "00000.png")["checkpoint"])
    first_stage = load_model(Source(named), False).stage.autoencoder
    with torch.no_grad():
        image = first_stage.decode(first_stage.encode(read_picture(path, Shape(32, 32), "--image")[None]))
    return to_uint8(image.clamp(-1, 1)).permute(0, 2, 3, 1).numpy().astype(int)
