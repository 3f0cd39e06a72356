"""What `tools/make_shards.py` leaves of an earlier output, of a run that dies, and where the system refuses one."""

import make_shards
import pytest

from tests.tools.test_make_shards import NAMES, files, folder, run, samples

__all__ = ["folder"]


def test_overwrite_replaces_the_shards_and_nothing_else(folder, tmp_path):
    output = tmp_path / "out"
    run(folder, output, "--samples-per-shard", 2)
    for name in ("NOTICE", "2024_photos.tar.md", "my.parquet"):
        (output / name).write_text("mine")
    assert run(folder, output, "--overwrite") == 0
    assert sorted(files(output)) == [
        "00000.parquet",
        "00000.tar",
        "00000_stats.json",
        "2024_photos.tar.md",
        "NOTICE",
        "my.parquet",
    ]
    for name in NAMES:
        (folder / name).unlink()
    assert run(folder, output, "--overwrite") == 1
    assert len(samples(output)) == len(NAMES)  # nothing to replace them with


def test_what_is_new_is_there_before_what_is_old_goes(folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run(folder, output, "--samples-per-shard", 2)

    def killed(path, *_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(make_shards.Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, output, "--overwrite")
    assert {sample["__key__"] for sample in samples(output)} >= {f"{number:09d}" for number in range(len(NAMES))}
    assert run(folder, output, "--overwrite") == 0
    assert len(samples(output)) == len(NAMES)


def test_what_the_system_refuses_is_said_in_three_parts(folder, tmp_path, capsys, monkeypatch):
    assert run(folder, "/proc/x/y") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "No such file or directory; allowed are files that this user can read" in said
    assert "change --output" in said

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_shards.ShardWriter, "_finish_shard", full)
    assert run(folder, tmp_path / "out") == 2
    assert "No space left on device; allowed are" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quality", [0, 101, 500])
def test_a_quality_is_1_to_100(folder, tmp_path, capsys, quality):
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path / "out", "--quality", quality)
    assert f"{quality} is given; allowed: 1 to 100" in capsys.readouterr().err


def test_a_run_that_dies_leaves_no_output(folder, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_shards.ShardWriter, "_finish_shard", die)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
