"""What breaks under a run ends it with a clear message, costs no checkpoint, and the same command goes on."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ldm_train.callbacks import CheckpointError
from ldm_train.checkpoint import verify_checkpoint
from ldm_train.config import ConfigError, explain_unmade
from ldm_train.train import train

from .conftest import composed
from .test_end_to_end import equal, last

ASSETS = Path(__file__).parents[1] / "ldm_train/assets/noto_emoji"
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "ImageTextDataModule", "global_step")
NAME = "demo_autoencoder"
RUN = [
    f"experiment={NAME}", "debug=tiny", "logger=csv", "data=webdataset", "data.num_workers=0", "data.index_dir=null",
    "callbacks.reconstructions=null", "callbacks.reconstruction_distance=null", "callbacks.calibration=null",
    "callbacks.summary=null", "callbacks.checkpoint.every_n_steps=1", "trainer.val_check_interval=null",
    "autoencoder.channels=16", "lr_scheduler.total_steps=6",
]  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    """Two shards that may be lost."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        shutil.copy(ASSETS / f"0000{number}.tar", folder)
    return folder


def run(root, shards, *overrides, pattern="{00000..00001}.tar"):
    train(composed(*RUN, f"data.shards='{shards}/{pattern}'", *overrides, root=root))


def kept(root):
    return {path.name: path.read_bytes() for path in root.glob(f"{NAME}/default/checkpoints/*")}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{00000..00001}.tar", r"no shard '00001.tar' in .*Allowed are paths.*`data.shards`"),
        ("*.tar", r"trained on other data .*fingerprint.*must keep `data.shards`.*`resume=never`"),
    ],
    ids=["named", "one of a glob"],
)
def test_a_shard_that_is_lost_before_a_resume(tmp_path, shards, pattern, said):
    run(tmp_path, shards, "trainer.max_steps=2", pattern=pattern)
    before = kept(tmp_path)
    (shards / "00001.tar").rename(tmp_path / "lost")
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, shards, "trainer.max_steps=4", pattern=pattern)
    assert kept(tmp_path) == before
    (tmp_path / "lost").rename(shards / "00001.tar")
    run(tmp_path, shards, "trainer.max_steps=4", pattern=pattern)
    assert last(tmp_path, NAME)["global_step"] == 4


def test_shards_that_changed_before_a_resume(tmp_path, shards):
    run(tmp_path, shards, "trainer.max_steps=2")
    before = kept(tmp_path)
    shutil.copy(ASSETS / "00003.tar", shards / "00001.tar")
    with pytest.raises(ConfigError, match=r"trained on other data .*fingerprint '\w+' -> '\w+'.*`resume=never`"):
        run(tmp_path, shards, "trainer.max_steps=4")
    assert kept(tmp_path) == before


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 40 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_run_whose_disk_was_full_ends_as_one_that_had_room(tmp_path, shards, disk):
    run(tmp_path / "unbroken", shards, "trainer.max_steps=6")
    run(disk, shards, "trainer.max_steps=2")
    before, free = kept(disk), shutil.disk_usage(disk).free
    (disk / "other").write_bytes(b"0" * (free - 40_000))
    message = r"step 3 could not be saved .*No space left.*MiB are needed and .*change `paths.root`"
    with pytest.raises(CheckpointError, match=message):
        run(disk, shards, "trainer.max_steps=6")
    assert kept(disk) == before
    verify_checkpoint(disk / NAME / "default/checkpoints/last.ckpt")
    (disk / "other").unlink()
    run(disk, shards, "trainer.max_steps=6")
    ended, unbroken = last(disk, NAME), last(tmp_path / "unbroken", NAME)
    for checkpoint in (ended, unbroken):  # not measured in these runs: no number equals itself
        del checkpoint["state_dict"]["autoencoder.latent_mean"], checkpoint["state_dict"]["autoencoder.latent_std"]
    assert [part for part in PARTS if not equal(ended[part], unbroken[part])] == []


def test_a_directory_that_became_read_only_is_named_with_its_key(shards, disk):
    run(disk, shards, "trainer.max_steps=2")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\); allowed is .*`paths.root`"):
        run(disk, shards, "trainer.max_steps=4")


def test_hydra_s_own_record_that_finds_no_room_is_explained():
    def _save_config():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as raised:
        _save_config()
    assert "change `paths.root`" in explain_unmade(raised.value)
