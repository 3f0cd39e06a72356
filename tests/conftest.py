from pathlib import Path

import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ldm_train.config import conf_dir, missing_keys, register
from ldm_train.nn.perceptual import VGG16_FILE
from ldm_train.train import train
from tests.forked_runs import ForkedRuns

# What a few steps of each stage of the demo need to be quick.
TINY_RUNS = {
    "demo_autoencoder": ["callbacks.calibration.num_images=32", "callbacks.reconstructions.num_images=4"],
    "demo": [
        "sampler.num_steps=2",
        "callbacks.samples.num_images=8",
        "callbacks.samples.num_pairs=4",
        "callbacks.samples.num_real=32",
    ],
    "demo_lora": ["sampler.num_steps=2", "callbacks.before_after.num_images=4"],
}


def composed(*overrides: str, root: Path | None = None, return_hydra_config: bool = False) -> DictConfig:
    """The config of a command line; with `root` in place of its runs' directory."""
    register()
    paths = [] if root is None else [f"paths.root={root}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", [*overrides, *paths], return_hydra_config=return_hydra_config)


def small_demo(steps: int) -> list[str]:
    """Overrides of a stage 2 without a stage 1, of so many steps of some milliseconds."""
    return [
        "experiment=demo", "debug=tiny", "logger=csv", "stage.autoencoder.checkpoint=untrained", "data.limit=50",
        "unet.channels=32", "conditioner.context_dim=64", "autoencoder.channels=16", "sampler.num_steps=2",
        f"trainer.max_steps={steps}", f"lr_scheduler.total_steps={steps}",
    ]  # fmt: skip


def filled(cfg: DictConfig, runs: Path) -> DictConfig:
    """The config with what an option leaves for the user to choose: the checkpoints of earlier stages, shards."""
    choices = {
        "name": "test",
        "data.shards": f"{cfg.paths.assets}/noto_emoji/*.tar",
        "data.shards.folder": "photos",
        "data.mixture.instance_dir": "photos",
        "stage.autoencoder.checkpoint": str(runs / "demo_autoencoder/default/checkpoints/last.ckpt"),
        "conditioner.encoder.weights": "untrained",
        "stage.base_checkpoint": str(runs / "demo/default/checkpoints/last.ckpt"),
    }
    for key in missing_keys(cfg):
        OmegaConf.update(cfg, key, choices[key])
    return cfg


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Toy tensors gain nothing from threads, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vgg16_weights(tmp_path_factory):
    """A file of VGG16's names and shapes with random values: the weights of LPIPS that nobody has to download."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    state = {
        f"features.{name}": torch.randn(tensor.shape, generator=generator) * (tensor[0].numel() / 2) ** -0.5
        if tensor.ndim > 1
        else torch.zeros(tensor.shape)
        for name, tensor in shapes.items()
    }
    path = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints" / VGG16_FILE
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return path


@pytest.fixture
def torch_cache(vgg16_weights, monkeypatch):
    """Torch's cache, with the weights of LPIPS in it."""
    monkeypatch.setenv("TORCH_HOME", str(vgg16_weights.parents[2]))


@pytest.fixture(scope="session")
def forked_runs():
    """Starts runs in processes of their own."""
    runs = ForkedRuns()
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """A directory of runs that holds all three stages of the demo, each trained for a few steps."""
    root = tmp_path_factory.mktemp("runs")
    for experiment, overrides in TINY_RUNS.items():
        train(composed(f"experiment={experiment}", "debug=tiny", "logger=csv", *overrides, root=root))
    return root
