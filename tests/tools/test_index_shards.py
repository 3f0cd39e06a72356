"""`tools/index_shards.py`: what it leaves is what a run opens, and what it says is what there is."""

import json

import index_shards
import pytest

from ldm_train.data import RemoteFiles, index_store
from ldm_train.data.index import build_index
from ldm_train.data.locations import expand_shards
from tests.data.conftest import sample, write_tar


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    write_tar(folder / "0.tar", [member for number in range(3) for member in sample(number, punsafe=number / 4)])
    write_tar(folder / "1.tar", [*sample(3)[:2], *sample(4)])
    return str(folder / "*.tar")


def run(*options) -> int:
    return index_shards.main([str(option) for option in options])


def test_a_run_opens_the_index_and_scans_nothing(shards, tmp_path, capsys, monkeypatch):
    assert run(shards, "--output", tmp_path / "index", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(index_store, "scan", None)
    index = build_index(expand_shards(shards), directory=tmp_path / "index")
    assert (facts["shards"], facts["samples"], facts["damage"]) == (2, 4, 1)
    assert facts["fingerprint"] == index.fingerprint
    assert str(index.columns.folder.parent) == facts["index"]
    assert "000003: no caption" in facts["first_damage"][0]


def test_filters_are_counted_by_reason(shards, tmp_path, capsys):
    assert run(shards, "--output", tmp_path / "index", "--filter", "punsafe<=0.25", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == 2
    assert facts["refused"] == {
        "fails: punsafe <= 0.25": 1,
        "no metadata field 'punsafe' for punsafe <= 0.25": 1,
    }


def test_the_table_names_damage_and_strict_exits_with_1(shards, tmp_path, capsys):
    assert run(shards, "--output", tmp_path / "index", "--strict", "--dimensions") == 1
    shown = capsys.readouterr().out
    assert "damage 1.tar: 000003: no caption" in shown
    assert "samples" in shown


def test_what_cannot_be_used_exits_with_2(shards, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(shards, "--output", tmp_path / "file") == 2
    assert run(tmp_path / "none.tar", "--output", tmp_path / "index") == 2
    assert "no shard 'none.tar'" in capsys.readouterr().err


@pytest.mark.parametrize("condition", ["punsafe", "punsafe<0.5", "punsafe<=1e", "<=1"])
def test_wrong_conditions_are_refused(shards, tmp_path, condition, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(shards, "--output", tmp_path / "index", "--filter", condition)
    assert "allowed" in capsys.readouterr().err


def test_options_of_a_store_reach_it_and_wrong_ones_are_refused(shards, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(index_shards, "RemoteFiles", lambda options: seen.append(options) or RemoteFiles(options))
    given = ("--storage-options", '{"s3": {"anon": true}}')
    assert run(shards, "--output", tmp_path / "index", *given) == 0
    assert seen == [{"s3": {"anon": True}}]
    assert run(shards, "--output", tmp_path / "index", "--storage-options", "[1]") == 2
    assert "change --storage-options" in capsys.readouterr().err
