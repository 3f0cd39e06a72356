import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ldm_train import config
from ldm_train import train as train_module
from ldm_train.config import ConfigError
from ldm_train.data import LocalFiles, Quarantine, ShardReadError
from ldm_train.train import resume_path, train

from .conftest import composed
from .locked import held_elsewhere

ROOT = Path(__file__).parents[1]


def command_line(*arguments, cwd):
    """Run `python -m ldm_train` in a directory of its own, as a shell does; runs go below it."""
    environment = {key: value for key, value in os.environ.items() if key != "LDM_RUNS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ldm_train", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def write_checkpoint(path, step):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": step}, path)
    return path


def test_it_works_from_any_directory(tmp_path):
    shown = command_line("experiment=demo", "--cfg", "job", "--resolve", "--package", "paths", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    paths = dict(line.split(": ", 1) for line in shown.stdout.splitlines() if not line.startswith("#"))
    assert paths["root"] == str(tmp_path / "runs")
    assert paths["run_dir"] == str(tmp_path / "runs/demo/default")
    assert list(Path(paths["assets"]).glob("noto_emoji/*.tar"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("unet.chanels=3", "ldm_train: `unet.chanels` is unknown to ldm_train.nn.UNet (did you mean `unet.channels`?)"),
        ("unet=huge", "Available options in 'unet':\n\tldm_churches\n\tldm_faces\n"),
        ("task=sample", "task is 'sample'; allowed are fit and validate; change `task`"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained_and_fails(override, expected, tmp_path):
    refused = command_line("experiment=demo", override, cwd=tmp_path)
    assert refused.returncode != 0
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_directory_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "taken").write_text("a file")
    options = ["experiment=demo", "debug=tiny", "stage.autoencoder.checkpoint=untrained", "paths.root=taken/runs"]
    refused = command_line(*options, cwd=tmp_path)
    assert refused.returncode != 0
    assert re.search(r"ldm_train: \S+ cannot be written \(.*\); allowed is .*; change `paths.root`", refused.stderr)


def test_a_run_that_is_being_written_is_refused_to_a_second_one(tmp_path):
    (tmp_path / "demo_autoencoder/default").mkdir(parents=True)
    with held_elsewhere(tmp_path / "demo_autoencoder/default/.lock") as holder:
        refused = rf"written by process {holder} on .*allowed is one run .*change `run_id`"
        with pytest.raises(ConfigError, match=refused):
            train(composed("experiment=demo_autoencoder", "debug=tiny", "logger=csv", root=tmp_path))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_auto_resumes_from_the_last_checkpoint_and_never_from_none(tmp_path):
    assert resume_path("auto", tmp_path) is None
    write_checkpoint(tmp_path / "checkpoints/previous.ckpt", 1)
    last = write_checkpoint(tmp_path / "checkpoints/last.ckpt", 2)
    assert resume_path("auto", tmp_path) == last
    assert resume_path("never", tmp_path) is None
    assert resume_path(str(last), tmp_path / "elsewhere") == last


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    previous = write_checkpoint(tmp_path / "checkpoints/previous.ckpt", 1)
    last = write_checkpoint(tmp_path / "checkpoints/last.ckpt", 2)
    last.write_bytes(last.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert resume_path("auto", tmp_path) == previous
    assert f"{last} cannot be read as a checkpoint" in caplog.text


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"allowed are auto .*, never .* and the path of a checkpoint; change `resume`"
    ):
        resume_path(str(tmp_path / "absent.ckpt"), tmp_path)


@pytest.mark.parametrize("requeue", ["true", "false"])
def test_a_run_that_wants_no_other_start_tells_the_job_s_script_before_anything_is_built(
    tmp_path, monkeypatch, requeue
):
    monkeypatch.setenv("LDM_START_FILE", str(tmp_path / "17"))
    words = "resume=nowhere.ckpt", f"callbacks.preemption.requeue={requeue}"
    cfg = composed("experiment=demo_autoencoder", *words, root=tmp_path)
    with pytest.raises(ConfigError, match="resume"):
        train(cfg)
    assert (tmp_path / "17.once").exists() is (requeue == "false")


def test_nothing_is_built_or_written_to_validate_what_was_never_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "_instantiate", lambda *_, **__: pytest.fail("a part was built"))
    with pytest.raises(ConfigError, match=r"task=validate found no checkpoint in .*; change `resume`"):
        train(composed("experiment=demo_autoencoder", "task=validate", root=tmp_path))
    assert not list(tmp_path.iterdir())


def test_only_the_usual_lines_of_lightning_are_hushed(caplog, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    said = ["GPU available: False, used: False", "💡 Tip: For seamless cloud logging", "a line about this run"]
    warned = [
        "Found 7 module(s) in eval mode at the start of training.",
        "The `srun` command is available on your system but is not used. HINT: ...",
        "a warning about this run",
    ]
    with warnings.catch_warnings(record=True) as heard, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        train_module._hush_lightning()
        for line in said:
            rank_zero_info(line)
        for message in warned:
            rank_zero_warn(message)
    assert [record.getMessage() for record in caplog.records] == said[-1:]
    assert [str(warning.message) for warning in heard] == warned[-1:]


def test_inside_a_job_the_advice_to_use_srun_is_heard(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train_module._hush_lightning()
        rank_zero_warn("The `srun` command is available on your system but is not used.")
    assert len(heard) == 1


class Unreadable(torch.utils.data.Dataset):
    """Data on a disk that fails."""

    def __len__(self):
        return 1

    def __getitem__(self, row):
        raise ShardReadError("a.tar could not be read. It must be readable: check `data.shards`.")


def refused_before(step, now, action):
    with train_module._refusals_before(step, SimpleNamespace(global_step=now)):
        action()


def test_what_the_system_refuses_our_own_lines_is_said_in_three_parts(tmp_path):
    (tmp_path / "file").write_text("")
    lines = {
        "nowhere.tar: No such file": lambda: LocalFiles().open(str(tmp_path / "nowhere.tar")),
        "folder: Not a directory": lambda: Quarantine(tmp_path / "file/folder/name", 1.0, 0).failed(
            0, "a", ValueError()
        ),
    }
    for found, action in lines.items():
        for refuse in (lambda action: refused_before(5, 5, action), _refused_at_once):
            with pytest.raises(ConfigError, match=rf"{found}.*; allowed are .*; change the key .*`data`"):
                refuse(action)
        with pytest.raises(OSError, match=found.partition(": ")[2]):  # training had begun: no fault of the config
            refused_before(5, 6, action)
    with pytest.raises(FileNotFoundError):  # by a line of someone else
        refused_before(5, 5, lambda: os.open(tmp_path / "nowhere", os.O_RDONLY))


def _refused_at_once(action):
    with train_module._refusals():
        action()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_read_at_first_is_said_without_a_traceback(workers):
    loader = torch.utils.data.DataLoader(Unreadable(), num_workers=workers)
    with pytest.raises(ConfigError) as refusal:
        refused_before(0, 0, lambda: next(iter(loader)))
    assert str(refusal.value) == "a.tar could not be read. It must be readable: check `data.shards`."
    with pytest.raises(ShardReadError):
        refused_before(0, 1, lambda: next(iter(loader)))
