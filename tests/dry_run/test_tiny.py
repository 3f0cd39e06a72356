"""The small run is of the same kinds as the large one, whatever that is, and is small."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm_train.config import check, conf_dir
from ldm_train.dry_run.data import aside
from ldm_train.dry_run.model import instantiated
from ldm_train.dry_run.tiny import make_steps, tiny
from tests.conftest import composed, filled
from tests.data.conftest import picture

EMOJI = ["data=emoji", "data.cache_decoded=false"]
DATA = {  # of experiments that leave their shards to the user
    "ldm_class_256": ["data=emoji_classes", "data.label.field=group"],
    "ldm_semantic": ["data=emoji_regions", "data.cache_decoded=false"],
}
PROMPTS = ["data.mixture.trigger=sks", "data.mixture.class_prompt='a dog'", "data.mixture.instance_prompt='a sks dog'"]
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
QUICK = ["demo_lora", "autoencoder_vq_f8", "ldm_512"]


def small(experiment, tmp_path, photos, *overrides):
    own = [] if experiment.startswith("demo") else DATA.get(experiment, EMOJI)
    if "dreambooth" in experiment:
        own = [*PROMPTS, f"data.mixture.instance_dir={photos}"]
    cfg = filled(composed(f"experiment={experiment}", *own, *overrides, root=tmp_path), tmp_path)
    return tiny(aside(cfg, tmp_path), tmp_path, None)


def kinds(node):
    """The targets in a plain config, by their places."""
    found = {"": node["_target_"]} if "_target_" in node else {}
    for key, child in node.items():
        if isinstance(child, dict):
            found |= {f"{key}.{path}": kind for path, kind in kinds(child).items()}
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_is_of_the_same_kinds_accepted_and_small(experiment, tmp_path):
    cfg = small(experiment, tmp_path, "photos")
    check(cfg)
    large = composed(f"experiment={experiment}", root=tmp_path)
    small_kinds, large_kinds = (kinds(OmegaConf.to_container(part)) for part in (cfg, large))
    for group in ("autoencoder", "unet", "conditioner", "objective", "schedule", "sampler", "guidance", "stage"):
        found, expected = (
            {k: v for k, v in part.items() if k.startswith(group)} for part in (small_kinds, large_kinds)
        )
        assert found == expected
    with torch.device("meta"):
        networks = [instantiated(cfg.copy()[group]) for group in ("autoencoder", "unet", "conditioner") if cfg[group]]
    assert sum(weight.numel() for network in networks for weight in network.parameters()) < 8_000_000


@pytest.mark.parametrize(
    "experiment", [*QUICK, *(pytest.param(e, marks=pytest.mark.thorough) for e in EXPERIMENTS if e not in QUICK)]
)
def test_its_steps_are_made(experiment, tmp_path, torch_cache):
    photos = tmp_path / "photos"
    if "dreambooth" in experiment:
        photos.mkdir()
        for number in range(2):
            (photos / f"{number}.png").write_bytes(picture(number))
    said = make_steps(small(experiment, tmp_path, photos), tmp_path)
    assert "2 steps" in said
    assert "read back" in said
