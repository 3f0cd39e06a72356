"""`tools/cache_latents.py --verify`: latents that are missing count as wrong ones."""

import json

from ldm_train.data import latent_encoding
from ldm_train.data.latent_settings import LatentSettings
from ldm_train.data.transforms import ImageTooLargeError
from tests.tools.test_cache_latents import run, source

__all__ = ["source"]


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_a_cache_without_any_latents_does_not_pass(source, tmp_path, capsys):
    small = ("--max-pixels", 4)
    assert run(source, tmp_path / "out", *small, "--verify", 8) == 1
    assert "nothing was compared" in said(capsys)
    assert run(source, tmp_path / "out", "--verify", 8) == 1
    text = said(capsys)
    assert "setting max_pixels: 4 -> 67108864" in text
    assert "no latents, though the image can be decoded" in text
    assert run(source, tmp_path / "out") == 2  # and no shard of it is taken for one of another limit
    assert "max_pixels: 4 -> 67108864" in said(capsys)


def test_latents_that_are_missing_where_there_is_an_image_are_a_fault(source, tmp_path, capsys, monkeypatch):
    right, calls = latent_encoding.decode_rgb, []

    def sometimes(data, max_pixels):
        calls.append(1)
        if len(calls) % 2:
            raise ImageTooLargeError("not today")
        return right(data, max_pixels)

    with monkeypatch.context() as broken:
        broken.setattr(latent_encoding, "decode_rgb", sometimes)
        assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "out", "--verify", 16) == 1
    text = said(capsys)
    assert "no latents, though the image can be decoded" in text
    assert "nan" not in text


def test_a_manifest_from_before_the_limit_was_kept_has_the_usual_one(source, tmp_path):
    assert run(source, tmp_path / "out") == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings.pop("max_pixels") == LatentSettings.read(settings).max_pixels == 1 << 26
