import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from ldm_train.checkpoint import (
    atomic_write,
    check_digest,
    digest,
    drop_prefixes,
    load_pretrained,
    read_checkpoint,
    strict_load,
)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_strict_load_restores_exactly_and_names_every_difference():
    source, target = model(), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    strict_load(target, source.state_dict())
    assert digest(source) == digest(target)
    state = source.state_dict() | {"stranger": torch.zeros(1), "0.bias": torch.zeros(7)}
    del state["1.weight"]
    with pytest.raises(
        ValueError, match=r"(?s)missing: 1\n +1.weight.*unexpected: 1\n +stranger.*0.bias: \(7,\), must be"
    ):
        strict_load(target, state)
    assert digest(source) == digest(target), "a refused load must change nothing"


def test_only_declared_prefixes_may_be_missing():
    state = drop_prefixes(model().state_dict(), ("1.",))
    assert list(state) == ["0.weight", "0.bias"]
    strict_load(model(), state, allowed_missing=("1.",))
    with pytest.raises(ValueError, match="missing: 2"):
        strict_load(model(), state, allowed_missing=("0.",))


def test_digest_sees_every_bit_and_name():
    changed = model()
    with torch.no_grad():
        changed[0].weight[0, 0] = torch.nextafter(changed[0].weight[0, 0], torch.tensor(1e9))
    renamed = nn.ModuleDict({"a": model()[0], "b": model()[1]})
    assert len({digest(model()), digest(changed), digest(renamed)}) == 3
    with pytest.raises(ValueError, match=r"another autoencoder .* change `stage.autoencoder.checkpoint`"):
        check_digest("autoencoder", digest(model()), digest(changed), "stage.autoencoder.checkpoint")


def test_a_part_is_loaded_from_a_stage_s_checkpoint(tmp_path):
    source = model()
    torch.save({"state_dict": {f"part.{k}": v for k, v in source.state_dict().items()} | {"x": torch.ones(1)}},
               tmp_path / "c.ckpt")  # fmt: skip
    fresh = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert digest(load_pretrained(fresh, str(tmp_path / "c.ckpt"), "part.", "key")) == digest(source)


def test_missing_damaged_and_dangerous_files_are_refused(tmp_path):
    path = tmp_path / "c.ckpt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*; allowed .* change `stage.x`"):
        read_checkpoint(path, key="stage.x")
    torch.save({"state_dict": {"w": torch.randn(1000)}}, path)
    whole = path.read_bytes()
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .* take `previous.ckpt`"):
            read_checkpoint(path)
    path.write_bytes(pickle.dumps({"state_dict": os.system}))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match="holds no `state_dict`"):
        read_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    with atomic_write(path) as temporary:
        temporary.write_text("old")

    def stop_halfway():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_process_number_do_not_meet(tmp_path):
    """As those of two containers are that share a folder."""
    path = tmp_path / "f"
    with atomic_write(path) as one:
        one.write_text("one")
        with atomic_write(path) as two:
            two.write_text("two")
        assert (one.read_text(), path.read_text()) == ("one", "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    """SIGKILL while one file is rewritten over and over: whatever is found under its name is complete."""
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from ldm_train.checkpoint import atomic_write
        for i in range(10**9):
            with atomic_write(Path({str(tmp_path / "f")!r})) as temporary:
                temporary.write_bytes(bytes([i % 256]) * 200_000)
        """
    )
    for delay in (0.0, 0.013, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", script])
        while not (tmp_path / "f").exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = (tmp_path / "f").read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1
