"""A subject from a folder of eight images: one command, exact resume, the adapters alone."""

import subprocess
import time

import pytest
from PIL import Image
from safetensors import safe_open

from ldm_train.checkpoint import read_checkpoint
from ldm_train.config import ConfigError
from ldm_train.train import train

from .conftest import composed
from .data.conftest import picture
from .test_end_to_end import equal, last
from .test_pages import ROOT, starting_with

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "ImageTextDataModule", "global_step")


def test_the_evaluation_of_demo_lora_s_flags_is_not_inherited():
    cfg = composed("experiment=demo_dreambooth", "data.mixture.instance_dir=few")
    assert cfg.callbacks.samples is None


@pytest.fixture
def photos(tmp_path):
    """The eight images that the README unpacks."""
    ((_, archive, _, _, *names),) = starting_with("tar")
    assert len(names) == 8
    folder = tmp_path / "few"
    folder.mkdir()
    subprocess.run(["tar", "-xf", ROOT / archive, "-C", folder, *names], check=True)
    return folder


@pytest.fixture
def overrides(tiny_runs, photos):
    """The command of the README with a few steps and class images."""
    trainings = starting_with("python", "-m", "ldm_train")
    (readme,) = (words for words in trainings if "experiment=demo_dreambooth" in words)
    return [
        *(word.replace("=few", f"={photos}") for word in readme), "debug=tiny", "logger=csv",
        f"stage.autoencoder.checkpoint={tiny_runs}/demo_autoencoder/default/checkpoints/last.ckpt",
        f"stage.base_checkpoint={tiny_runs}/demo/default/checkpoints/last.ckpt",
        "data.mixture.num_class_images=10", "sampler.num_steps=2", "callbacks.before_after.num_images=4",
    ]  # fmt: skip


def run(overrides, root, run_id="default", *more):
    train(composed(*overrides, f"run_id={run_id}", *more, root=root))
    return last(root, "demo_dreambooth", run_id)


def test_a_folder_of_eight_images_becomes_adapters(overrides, tmp_path):
    checkpoint = run(overrides, tmp_path)
    run_dir = tmp_path / "demo_dreambooth/default"
    assert checkpoint["global_step"] == 4
    assert all(name.endswith((".up", ".down")) for name in checkpoint["state_dict"])
    assert (run_dir / "checkpoints/last.ckpt").stat().st_size < 3_000_000
    with safe_open(run_dir / "lora/adapters.safetensors", framework="pt") as file:
        assert all(name.rpartition(".")[2] in ("down", "up", "alpha") for name in file.keys())  # noqa: SIM118
    assert len(list((run_dir / "class_images").iterdir())) == 10
    assert min(Image.open(run_dir / "lora/before_after.png").size) > 100


def test_an_interrupted_run_ends_bit_equal_to_an_unbroken_one(overrides, tmp_path):
    """Stopped in the middle of making class images, then after three steps, then run to the end."""
    total = "lr_scheduler.total_steps=6"
    unbroken = run(overrides, tmp_path, "unbroken", total, "trainer.max_steps=6")
    made, broken = (tmp_path / f"demo_dreambooth/{name}/class_images" for name in ("unbroken", "broken"))
    broken.mkdir(parents=True)
    for i in (0, 1, 2, 8):
        (broken / f"{i:05d}.png").write_bytes((made / f"{i:05d}.png").read_bytes())
    run(overrides, tmp_path, "broken", total, "trainer.max_steps=3")
    resumed = run(overrides, tmp_path, "broken", total, "trainer.max_steps=6")
    for part in PARTS:
        assert equal(resumed[part], unbroken[part]), part


def test_given_class_images_train_as_generated_ones_do(overrides, tmp_path):
    generated = run(overrides, tmp_path, "generated")
    folder = tmp_path / "demo_dreambooth/generated/class_images"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    given = run(overrides, tmp_path, "given", f"data.mixture.class_dir={folder}")
    assert equal(given["state_dict"], generated["state_dict"])
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert not (tmp_path / "demo_dreambooth/given/class_images").exists()


def test_the_class_changes_what_is_learned_and_can_be_left_out(overrides, tmp_path):
    alone = run(overrides, tmp_path, "alone", "data.mixture.class_prompt=null")
    assert not (tmp_path / "demo_dreambooth/alone/class_images").exists()
    assert not equal(alone["state_dict"], run(overrides, tmp_path, "with")["state_dict"])


def test_a_folder_that_changed_is_not_gone_on_with(overrides, photos, tmp_path):
    run(overrides, tmp_path)
    (photos / "new.png").write_bytes(picture(999))
    with pytest.raises(ConfigError, match=r"trained on other data .*fingerprint"):
        run(overrides, tmp_path, "default", "trainer.max_steps=6")


def test_a_captioned_folder_trains_without_a_class(overrides, photos, tmp_path):
    for path in list(photos.iterdir()):
        path.with_suffix(".txt").write_text(f"picture {path.stem}")
    kept = [entry for entry in overrides if not entry.startswith(("data.", "experiment="))]
    overrides = ["experiment=demo_lora", *kept, "data=folder", f"data.shards.folder={photos}"]
    with pytest.raises(ConfigError, match=r"no data set 'flags'; allowed are data; .*before_after.data_set"):
        train(composed(*overrides, root=tmp_path))
    assert not list(tmp_path.glob("demo_lora/*/checkpoints/*"))
    train(composed(*overrides, "callbacks.before_after.data_set=null", root=tmp_path))
    assert last(tmp_path, "demo_lora")["global_step"] == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mixture.instance_dir=nowhere", r"nowhere is not there.*change `data.mixture.instance_dir`"),
        ("data.mixture.class_dir=nowhere", r"nowhere is not there.*change `data.mixture.class_dir`"),
        ("data.mixture.class_prompt=a zwx", r"allowed are captions without the trigger 'zwx'"),
        (f"data.mixture.instance_prompt={'long ' * 30}", r"would not see .*shorten `data.mixture.instance_prompt`"),
        ("data.mixture.prior_weight=0.5", r"2 images would have \[1, 1\].*change `data.mixture_block`"),
        ("data.mixture.prior_weight=nan", r"prior_weight is nan; allowed are finite weights above 0"),
        ("data.mixture.class_prompt=''", r"`data.mixture.class_prompt` is ''; allowed are words"),
        ("lr_scheduler.warmup_steps=9", r"warmup_steps 9; allowed are more steps.*`lr_scheduler.warmup_steps`"),
    ],
)
def test_refusals_come_before_any_image_or_step_and_name_the_key(overrides, tmp_path, override, message):
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        run(overrides, tmp_path, "default", override)
    assert not (tmp_path / "demo_dreambooth/default/class_images").exists()
    assert not (tmp_path / "demo_dreambooth/default/checkpoints").exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_killed_twice_ends_with_the_bits_of_an_unbroken_one(overrides, forked_runs, tmp_path):
    """SIGKILL while class images are made, SIGKILL after a checkpoint, then the same command to the end."""
    overrides = [
        *overrides, "data.mixture.num_class_images=60", "trainer.max_steps=30", "callbacks.checkpoint.every_n_steps=4",
        "callbacks.before_after=null",
    ]  # fmt: skip
    unbroken = run(overrides, tmp_path, "unbroken")
    run_dir = tmp_path / "demo_dreambooth/killed"
    for stage, awaited in enumerate(("class_images/00010.png", "checkpoints/last.ckpt")):
        forked_runs.start(*overrides, "run_id=killed", root=tmp_path)
        while not (run_dir / awaited).exists() and forked_runs.is_running:
            time.sleep(0.01)
        forked_runs.kill()
        forked_runs.wait()
        assert (run_dir / awaited).exists()
        assert stage or len(list((run_dir / "class_images").glob("*.png"))) < 60
    assert read_checkpoint(run_dir / "checkpoints/last.ckpt")["global_step"] < 30
    forked_runs.finish(*overrides, "run_id=killed", root=tmp_path)
    killed = last(tmp_path, "demo_dreambooth", "killed")
    for part in PARTS:
        assert equal(killed[part], unbroken[part]), part


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.thorough
def test_two_processes_make_the_same_class_images_and_weights_as_one(overrides, forked_runs, tmp_path):
    one = run(overrides, tmp_path, "one", "data.batch_size=4")
    ddp = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2", "run_id=two"]
    forked_runs.finish(*overrides, *ddp, "callbacks.throughput=null", root=tmp_path, ranks=2)
    two = last(tmp_path, "demo_dreambooth", "two")
    folders = [tmp_path / f"demo_dreambooth/{name}/class_images" for name in ("one", "two")]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    worst = max(float((one["state_dict"][k] - two["state_dict"][k]).abs().max()) for k in one["state_dict"])
    assert worst < 1e-5
