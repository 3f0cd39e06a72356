"""The small run is of the same kinds as the large one, whatever that is, and is small."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm_train.config import check, conf_dir
from ldm_train.dry_run.data import aside
from ldm_train.dry_run.model import instantiated
from ldm_train.dry_run.tiny import make_steps, tiny
from tests.conftest import composed, filled
from tests.data.conftest import encode, picture, sample, write_tar

PROMPTS = ["data.mixture.trigger=sks", "data.mixture.class_prompt='a dog'", "data.mixture.instance_prompt='a sks dog'"]
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
MAP = np.zeros((8, 8), np.uint8)
QUICK = ["demo_lora", "autoencoder_vq_f8", "ldm_512"]


def data_of(experiment, folder):
    """Overrides with data for what an experiment asks: captions, classes and maps, or a folder of photos."""
    if "dreambooth" in experiment:
        (folder / "photos").mkdir()
        for number in range(2):
            (folder / "photos" / f"{number}.png").write_bytes(picture(number))
        return [*PROMPTS, f"data.mixture.instance_dir={folder}/photos"]
    if experiment.startswith("demo"):
        return []
    members = []
    for number in range(40):
        members += [*sample(number, **{"class": number % 3}), (f"{number:06d}.seg.png", encode(MAP))]
    write_tar(folder / "shards/00000.tar", members)
    return [f"data.shards={folder}/shards/*.tar", "data.val_fraction=0.2", "data.filters=[]"]


def small(experiment, folder):
    own = data_of(experiment, folder)
    if experiment == "autoencoder_decoder":
        own += [f"stage.autoencoder.checkpoint={folder}/finished.ckpt"]
    cfg = filled(composed(f"experiment={experiment}", *own, root=folder), folder)
    return tiny(aside(cfg, folder), folder, None)


def kinds(node):
    """The targets in a plain config, by their places."""
    found = {"": node["_target_"]} if "_target_" in node else {}
    for key, child in node.items():
        if isinstance(child, dict):
            found |= {f"{key}.{path}": kind for path, kind in kinds(child).items()}
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_is_of_the_same_kinds_accepted_and_small(experiment, tmp_path):
    cfg = small(experiment, tmp_path)
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
    said = make_steps(small(experiment, tmp_path), tmp_path)
    assert "2 steps" in said
    assert "read back" in said
