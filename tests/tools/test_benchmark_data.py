"""`tools/benchmark.py data`: its contenders do the same work, and its ratios are those of the clock."""

import json

import benchmark
import benchmark_data
import pytest
import torch
from rich.console import Console

from ldm_train.data import build_index, expand_shards
from ldm_train.data.transforms import to_signed_unit


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_data, "SHORT_SIDES", (70, 120))
        return benchmark_data.prepare(folder, 6, 64, Console(quiet=True))


def epochs_of(patterns, shards, side):
    """Name -> all images that a contender makes, in a fixed order, and whether it gave them in another."""
    starts = benchmark_data.contenders(patterns, shards, side, 3)
    found = {name: torch.cat(list(start())) for name, start in starts.items()}
    return {name: (images[images.flatten(1).float().sum(1).argsort()], images) for name, images in found.items()}


@pytest.mark.parametrize("shards", [benchmark_data.ORIGINAL, benchmark_data.RESIZED])
def test_all_make_the_same_images(patterns, shards):
    epochs = epochs_of(patterns, shards, 64)
    plain = benchmark_data.PLAIN if shards == benchmark_data.RESIZED else benchmark_data.PLAIN_ORIGINAL
    names = benchmark_data.OURS, benchmark_data.OURS_CONVERTED, benchmark_data.LIMIT, plain
    as_bytes, converted, limit, plain = (epochs[name][0] for name in names)
    assert as_bytes.shape == (6, 3, 64, 64)
    assert torch.equal(as_bytes, limit)
    assert as_bytes.dtype == torch.uint8
    assert converted.dtype == plain.dtype == torch.float32
    assert torch.equal(converted, to_signed_unit(as_bytes))
    # Another decoder and another resize, which crops after and not before: alike, not equal.
    assert (converted - plain).abs().mean() < 0.05
    assert not torch.equal(epochs[benchmark_data.OURS][1], as_bytes)  # shuffled
    if shards == benchmark_data.ORIGINAL:
        reduced = epochs[benchmark_data.OURS_REDUCED][0].float() - as_bytes
        assert reduced.abs().mean() < 0.05 * 127.5


def test_the_cached_latents_are_those_of_all_images(patterns):
    epochs = epochs_of(patterns, benchmark_data.LATENTS, 64)
    ours, limit = epochs[benchmark_data.OURS][0], epochs[benchmark_data.LIMIT][0]
    assert ours.shape == (6, 8, 8, 8)
    assert torch.equal(ours, limit)
    assert len(torch.unique(ours.flatten(1), dim=0)) == 6


def test_the_shards_are_jpeg_files_and_the_resized_ones_have_their_size(patterns):
    for name, sides in ((benchmark_data.ORIGINAL, (70, 120)), (benchmark_data.RESIZED, (64, 64))):
        index = build_index(expand_shards(patterns[name]))
        reader = benchmark_data.ShardReader(index.paths)
        for row in range(len(index)):
            metadata = index.metadata(reader, row)
            assert sides[0] <= min(metadata["width"], metadata["height"]) <= sides[1]
            assert index.read(reader, row, benchmark_data.IMAGE)[:3] == b"\xff\xd8\xff"


def test_rates_and_ratios_are_medians_over_rounds():
    plain, ours, limit = benchmark_data.PLAIN, benchmark_data.OURS, benchmark_data.LIMIT
    originals = benchmark_data.PLAIN_ORIGINAL
    rounds = [
        {originals: 8.0, plain: 4.0, ours: 1.0, limit: 1.0},
        {originals: 8.0, plain: 8.0, ours: 2.0, limit: 1.0},
        {originals: 9.0, plain: 3.0, ours: 1.0, limit: 0.9},
    ]
    rows = {row.name: row for row in benchmark_data.rows_of("original", rounds, 10)}
    assert rows[plain].images_per_second == pytest.approx(2.5)
    assert rows[ours].milliseconds_per_image == pytest.approx(100.0)
    assert rows[ours].of_plain == 4.0
    assert rows[ours].of_limit == pytest.approx(0.9)
    assert rows[ours].of_plain_from_originals == 8.0
    assert rows[plain].of_plain == rows[limit].of_limit == rows[originals].of_plain_from_originals == 1.0
    without = [{name: seconds for name, seconds in found.items() if name != plain} for found in rounds]
    assert all(row.of_plain is None for row in benchmark_data.rows_of("original", without, 10))


def test_an_epoch_of_fewer_images_is_no_victory():
    with pytest.raises(ValueError, match="allowed: 4 each"):
        benchmark_data.timed_epochs({"a": lambda: iter([torch.zeros(4)]), "b": lambda: iter([torch.zeros(3)])}, 4)


def test_the_command_writes_its_figures_and_keeps_the_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_data, "SHORT_SIDES", (40, 60))
    command = ["data", "--shards", tmp_path, "--images", 4, "--batch", 2, "--image-size", 32, "--rounds", 1]
    command += ["--output", tmp_path / "figures.json"]
    assert benchmark.main([str(word) for word in command]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    names = {shards: [row["name"] for row in found["rows"] if row["shards"] == shards] for shards in found["megabytes"]}
    assert list(names) == [benchmark_data.ORIGINAL, benchmark_data.RESIZED, benchmark_data.LATENTS]
    for own in names.values():
        assert own[0] == benchmark_data.PLAIN_ORIGINAL
        assert {benchmark_data.OURS, benchmark_data.LIMIT} <= set(own)
    assert len(list(tmp_path.glob("*/*.tar"))) == 3
    assert benchmark_data.PLAIN in capsys.readouterr().out
    assert benchmark.main(["data", "--images", "5", "--batch", "2"]) == 2
    assert "change --images" in capsys.readouterr().err
