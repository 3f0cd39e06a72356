"""Every file of weights that a run reads is known before it is read."""

from pathlib import Path

import pytest

from ldm_train.dry_run import needed_weights
from ldm_train.dry_run.weights import without
from ldm_train.nn.perceptual import cached_backbone
from tests.conftest import composed

LORA = ["stage=lora", "callbacks=lora", "stage.base_checkpoint=b", "stage.autoencoder.checkpoint=null"]


def needed(*overrides, root):
    return {weights.key: weights for weights in needed_weights(composed(*overrides, root=root))}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=demo_autoencoder"], {}),
        (["experiment=autoencoder_kl_f8"], {"perceptual.backbone": "vgg16"}),
        (["experiment=autoencoder_kl_f8", "perceptual.weight=0"], {}),
        (
            ["experiment=ldm_512", "callbacks.samples.extractor.inception_weights=i.pth"],
            {
                "conditioner.encoder.weights": "text encoder",
                "stage.autoencoder.checkpoint": "checkpoint",
                "callbacks.samples.extractor.inception_weights": "inception",
            },
        ),
        (["experiment=ldm_512", "debug=tiny"], {}),
        (
            ["experiment=ldm_512", *LORA],
            {"conditioner.encoder.weights": "text encoder", "stage.base_checkpoint": "base model"},
        ),
    ],
)  # fmt: skip
def test_the_files_of_a_config(overrides, expected, tmp_path):
    assert {key: weights.kind for key, weights in needed(*overrides, root=tmp_path).items()} == expected


def test_each_is_looked_for_where_the_run_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert needed("experiment=autoencoder_kl_f8", root=tmp_path)["perceptual.backbone"].path == cached_backbone()
    monkeypatch.chdir(tmp_path)
    path = needed("experiment=autoencoder_kl_f8", "perceptual.backbone=a/v.pth", root=tmp_path)["perceptual.backbone"]
    assert path.path == Path(tmp_path, "a/v.pth")
    assert not path.is_there
    path.path.parent.mkdir()
    path.path.touch()
    assert path.is_there


def test_a_config_without_them_needs_none(tmp_path):
    cfg = composed("experiment=ldm_512", "perceptual=lpips", root=tmp_path)
    without(cfg, needed_weights(cfg))
    assert needed_weights(cfg) == []
