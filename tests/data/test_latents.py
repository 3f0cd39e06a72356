import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_train.data import AspectBuckets, ColourRegions, ImageTextDataModule, LatentCache, SegmentationMember
from ldm_train.data.index import IMAGE, build_index
from ldm_train.data.latent_encoding import MomentsEncoder, SourceImages
from ldm_train.data.latent_member import DTYPES, DamagedSampleError, pack, pack_failure, unpack
from ldm_train.data.latent_records import ValueRange
from ldm_train.data.latent_settings import LatentSettings
from ldm_train.data.latent_writing import LatentCacheWriter
from ldm_train.data.storage import LOCAL_FILES
from ldm_train.data.transforms import to_signed_unit
from tests.data.conftest import sample, write_tar
from tests.stages.toy import autoencoder

SETTINGS = LatentSettings("0" * 64, 8, 2, 4, 2, "float32")


def cached(source_paths, folder, storage=LOCAL_FILES, **changes):
    """A cache of shards, made by the parts that the tool is made of."""
    settings_ = dataclasses.replace(SETTINGS, **changes)
    writer = LatentCacheWriter(folder, source_paths, settings_, {}, storage)
    encoder, sources = (
        MomentsEncoder(autoencoder().eval(), settings_),
        SourceImages(source_paths, settings_, 2, storage),
    )
    for number, (path, name) in enumerate(zip(source_paths, writer.names, strict=True)):
        with writer.shard(path, name) as shard:
            shard.fill(encoder, [batch for batch in sources if batch.shard == number], sources.index.starts[number])
    assert None not in writer.merge()
    return str(folder / "*.tar")


@pytest.fixture
def source(write_shards, tmp_path):
    """Three shards; in the second one image is damaged, one sample has no caption and one no image."""
    pattern = write_shards(4, 0, 3)
    broken, silent, blind = sample(10), sample(11), sample(12)
    broken[0] = ("000010.png", b"no image at all")
    members = [*broken, *sample(13), *silent[:2], *blind[1:], *sample(14)]
    write_tar(tmp_path / "shards" / "00001.tar", members)
    return pattern, [str(tmp_path / "shards" / f"{number:05d}.tar") for number in range(3)]


@given(
    st.tuples(*[st.integers(1, 4)] * 4),
    st.sampled_from(list(DTYPES.values())),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 6),
)
@settings(max_examples=50, deadline=None)
def test_a_member_holds_what_was_put_into_it(shape, dtype, place):
    moments = torch.randn(shape).to(dtype)
    found = unpack(pack(moments, place[:2], place[2:]))
    assert found.moments.dtype == dtype
    assert torch.equal(found.moments, moments)
    assert (*found.source_size, *found.box) == place


def test_a_member_is_a_header_of_64_bytes_and_the_numbers():
    data = pack(torch.ones(1, 8, 64, 64, dtype=torch.float16), (1, 2), (3, 4, 5, 6))
    assert len(data) == 64 + 2 * 8 * 64 * 64
    assert np.array_equal(np.frombuffer(data, "<f2", offset=64), np.ones(8 * 64 * 64))


def test_what_is_no_member_is_refused():
    data = pack(torch.ones(1, 2, 2, 2), (1, 1), (0, 0, 1, 1))
    with pytest.raises(ValueError, match="cut"):
        unpack(data[:-1])
    with pytest.raises(ValueError, match=r"no cached latents; allowed are .* tools/cache_latents.py"):
        unpack(b"\x89PNG" + data)
    with pytest.raises(DamagedSampleError, match="not a picture: é"):
        unpack(pack_failure("not a picture: é"))


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_range_of_pieces_is_that_of_the_whole(pieces):
    merged, whole = ValueRange(), torch.tensor([value for piece in pieces for value in piece])
    for piece in pieces:
        part = ValueRange()
        part.add(torch.tensor(piece))
        merged.merge(part)
    summary, values = merged.summary(), whole.double()
    assert (summary["min"], summary["max"]) == (float(whole.min()), float(whole.max()))
    assert summary["mean"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert summary["std"] == pytest.approx(float(values.std(correction=0)), abs=2e-3)


def test_rows_of_a_cache_are_those_of_its_source_though_samples_are_damaged(source, tmp_path):
    pattern, paths = source
    latents = cached(paths, tmp_path / "latents")
    for required in ((IMAGE,), (0, 1), (0, 2), (0, 1, 2)):
        images, moments = (
            build_index(paths, required),
            build_index(sorted(map(str, (tmp_path / "latents").glob("*.tar"))), required),
        )
        assert np.array_equal(images.starts, moments.starts)
        assert np.array_equal(images.sample_id, moments.sample_id)
        assert [images.full_key(row) for row in range(len(images))] == [
            moments.full_key(r) for r in range(len(moments))
        ]
    assert latents.endswith("*.tar")
    assert pattern


def test_the_manifest_counts_damage_and_values(source, tmp_path):
    cached(source[1], tmp_path / "latents")
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["damaged"], manifest["shapes"]) == (11, 1, {"8x4x4": 10})
    assert -1 <= manifest["images"]["min"] < manifest["images"]["max"] <= 1
    record = json.loads((tmp_path / "latents" / "00001_latents.json").read_text())
    assert [entry["key"] for entry in record["damaged"]] == ["000010"]


def modules(source, tmp_path, options=(), **changes):
    """The same data as images and as cached latents."""
    settings_ = {"image_size": 8, "batch_size": 2, "seed": 3, "max_bad_fraction": 1.0} | dict(options)
    latents = cached(source[1], tmp_path / "latents", **changes)
    return ImageTextDataModule(source[0], **settings_), ImageTextDataModule(latents, **settings_, latents=LatentCache())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cache_decoded", [False, True])
def test_batches_are_those_of_the_images_encoded(source, tmp_path, flip, workers, cache_decoded):
    options = {"flip": flip, "num_workers": workers, "cache_decoded": cache_decoded}
    images, latents = modules(source, tmp_path, options, flip=flip)
    model, seen = autoencoder().eval(), 0
    for _ in range(2):
        for a, b in zip(images.train_dataloader(), latents.train_dataloader(), strict=True):
            assert "image" not in b
            for name in ("sample_id", "position", "original_size", "crop"):
                assert torch.equal(a[name], b[name])
            assert all(a[name] == b[name] for name in ("caption", "key", "epoch"))
            with torch.no_grad():
                torch.testing.assert_close(
                    b["moments"], model.moments(to_signed_unit(a["image"])), rtol=1e-5, atol=1e-5
                )
            seen += 1
    assert seen == 2 * (10 // 2)


def test_real_images_come_from_the_source_with_the_selection_of_the_run(source, tmp_path):
    options = {"val_fraction": 0.3, "limit": 9}
    images, latents = modules(source, tmp_path, options)
    for a, b in zip(images.reference_batches(None, 3), latents.reference_batches(None, 3), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["sample_id"], b["sample_id"])
        assert a["caption"] == b["caption"]
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"`data.latents.reference_shards`.*`callbacks.samples=null`"):
        next(iter(modules_again(latents).reference_batches(1, 1)))
    moved = modules_again(latents, LatentCache(str(tmp_path / "elsewhere" / "*.tar")))
    assert len(next(iter(moved.reference_batches(2, 2)))["image"]) == 2
    other = modules_again(latents, LatentCache(str(tmp_path / "elsewhere" / "00000.tar")))
    with pytest.raises(ValueError, match=r"are not the .* samples of the cache.*`data.latents.reference_shards`"):
        next(iter(other.reference_batches(2, 2)))


def modules_again(module, latents=None):
    return ImageTextDataModule(
        module.corpus.options.shards, 8, 2, 3, latents=latents or LatentCache(), max_bad_fraction=1.0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "`data.image_size` is 16 with cached latents; allowed is 8"),
        ({"crop": "random"}, "`data.crop` is RandomCrop"),
        ({"flip": True}, "`data.flip` is True.*without --flip"),
        (
            {"buckets": AspectBuckets(2), "bucket_unit": 4},
            "`data.buckets` is set, which asks for the shapes 6x10, 8x8, 10x6, with cached latents; allowed is 8x8",
        ),
        ({"segmentation": ColourRegions()}, "`data.segmentation` is a ColourRegions .*no pixels"),
        (
            {"segmentation": SegmentationMember(3)},
            "`data.segmentation.extension` is seg.png with .*without --segmentation",
        ),
        ({"interpolation": "bilinear"}, "`data.interpolation` is bilinear"),
        ({"reducing_gap": 1.0}, "`data.reducing_gap` is 1.0"),
        ({"max_pixels": 100}, "`data.max_pixels` is 100 with cached latents; allowed is 67108864"),
    ],
)
def test_a_run_that_wants_other_images_is_refused(source, tmp_path, options, message):
    _, latents = modules(source, tmp_path)
    settings_ = {"image_size": 8, "batch_size": 2, "seed": 3} | options
    with pytest.raises(ValueError, match=message):
        _ = ImageTextDataModule(latents.corpus.options.shards, **settings_, latents=LatentCache()).latent_facts


def test_a_cache_of_images_out_of_range_or_without_a_manifest_or_changed_is_refused(source, tmp_path):
    _, latents = modules(source, tmp_path)
    path = tmp_path / "latents" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"images": {"min": 0.0, "max": 255.0}}))
    with pytest.raises(ValueError, match=r"from 0 to 255 when they were encoded; allowed is \[-1, 1\].*--overwrite"):
        _ = modules_again(latents).latent_facts
    path.write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(ValueError, match=r"version 2.*--overwrite"):
        _ = modules_again(latents).latent_facts
    path.write_text(json.dumps(manifest))
    with (tmp_path / "latents" / "00000.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=r"00000.tar has \d+ bytes, its cache's manifest.json says \d+"):
        _ = modules_again(latents).latent_facts
    path.unlink()
    with pytest.raises(ValueError, match=r"no manifest.json in .*--merge"):
        _ = modules_again(latents).latent_facts


def test_the_source_is_never_overwritten(source, tmp_path):
    with pytest.raises(ValueError, match="--output"):
        LatentCacheWriter(tmp_path / "shards", source[1], SETTINGS, {})
