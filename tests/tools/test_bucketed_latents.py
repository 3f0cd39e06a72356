"""Aspect buckets and segmentation maps in the cache: the batches are those of the images in the same buckets."""

import filecmp
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ldm_train.conditioning import SemanticMapConditioner
from ldm_train.data import (
    AspectBuckets,
    ImageTextDataModule,
    LatentCache,
    MinimumSize,
    SegmentationMember,
    ShardReader,
    build_index,
    latent_encoding,
)
from ldm_train.data.index import IMAGE
from ldm_train.data.latent_member import HEADER_SIZE
from ldm_train.data.transforms import to_signed_unit
from ldm_train.diffusion import Denoiser, cosine_schedule
from ldm_train.nn import UNet
from tests.data.conftest import encode, write_tar
from tests.tools.test_cache_latents import autoencoder, difference, losses, run

SIZE, STEP = 24, 8  # three shapes, 16 x 32 the tallest
BUCKETS = {"buckets": AspectBuckets(STEP), "bucket_unit": 3}
SIZES = [(40, 20), (24, 24), (20, 48), (30, 33), (90, 30), (21, 40), (17, 16)]
LYING = {4, 9}  # images on their side by an EXIF mark
DAMAGED = {2, 8, 13}  # their heads are whole


def picture(number):
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if number in LYING:
        exif = Image.Exif()
        exif[0x0112] = 6
        return "jpg", encode(pixels, "JPEG", exif=exif)
    data = encode(pixels)
    return "png", data[: len(data) // 2] if number in DAMAGED else data


def members(number):
    kind, data = picture(number)
    key, (width, height) = f"{number:06d}", Image.open(io.BytesIO(data)).size
    classes = np.random.default_rng(number).integers(0, 9, (width, height) if number in LYING else (height, width))
    fields = {"width": width, "height": height}
    found = [(f"{key}.{kind}", data), (f"{key}.txt", f"caption {number}".encode())]
    found += [(f"{key}.json", json.dumps(fields).encode())]
    return found if number == 11 else [*found, (f"{key}.seg.png", encode(classes.astype(np.uint8)))]


@pytest.fixture
def source(tmp_path):
    """Three shards of images of many sizes, of which some are damaged; one has no map."""
    for shard in range(3):
        group = [member for number in range(12 * shard, 12 * shard + 12) for member in members(number)]
        write_tar(tmp_path / f"shards/{shard:05d}.tar", group)
    return tmp_path / "shards" / "*.tar"


def cache(source, output, *options):
    return run(source, output, "--image-size", SIZE, "--buckets", STEP, "--dtype", "float32", *options)


def module(shards, latents=None, size=SIZE, **options):
    settings = {"batch_size": 3, "seed": 5, "max_bad_fraction": 1.0} | BUCKETS | options
    return ImageTextDataModule(str(shards), size, latents=latents, **settings)


def test_training_from_the_cache_is_training_from_the_images_in_the_same_buckets(source, tmp_path, capsys):
    assert cache(source, tmp_path / "latents", "--flip", "--verify", 40) == 0
    assert "complete in the shapes 16x32, 24x24, 32x16" in capsys.readouterr().err
    options = {"size": SIZE, "flip": True, "steps": 20, **BUCKETS}
    images = losses(source, **options)
    latents = losses(tmp_path / "latents" / "*.tar", latents=LatentCache(), **options)
    assert difference(images, latents) < 1e-5


def semantic_parts():
    torch.manual_seed(1)
    unet = UNet(4, 4, 16, (1, 2), 1, (2,), attention="plain", num_heads=2, norm_groups=8, concat_channels=3)
    conditioner = SemanticMapConditioner(9, 3)
    return {"denoiser": Denoiser(unet, cosine_schedule(100), "v"), "conditioner": conditioner}


def test_training_on_maps_from_the_cache_is_training_on_maps_from_the_images(source, tmp_path):
    assert cache(source, tmp_path / "latents", "--segmentation", "seg.png") == 0
    options = {"size": SIZE, "segmentation": SegmentationMember(9), "parts": semantic_parts, **BUCKETS}
    images = losses(source, **options)
    latents = losses(tmp_path / "latents" / "*.tar", latents=LatentCache(), **options)
    assert difference(images, latents) < 1e-5


def test_batches_are_those_of_the_images_in_the_same_buckets(source, tmp_path):
    assert cache(source, tmp_path / "latents", "--segmentation", "seg.png", "--flip") == 0
    model, shapes, ids = autoencoder().eval(), set(), []
    options = {"val_fraction": 0.3, "flip": True, "segmentation": SegmentationMember(9), "num_workers": 1}
    of_images = module(source, **options)
    of_latents = module(tmp_path / "latents" / "*.tar", LatentCache(), **options)
    assert of_latents.corpus.shapes == of_images.corpus.shapes
    for loader in ("train_dataloader", "train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(of_images, loader)(), getattr(of_latents, loader)(), strict=True):
            for name in ("sample_id", "position", "original_size", "crop", "segmentation"):
                assert torch.equal(a[name], b[name]), name
            assert all(a[name] == b[name] for name in ("caption", "key", "epoch"))
            with torch.no_grad():
                expected = model.moments(to_signed_unit(a["image"]))
                torch.testing.assert_close(b["moments"], expected, rtol=1e-4, atol=1e-4)
            shapes.add(tuple(a["image"].shape[-2:]))
            ids += a["sample_id"].tolist()
    assert shapes == set(of_images.corpus.shapes)
    assert len(set(ids)) > 20
    assert "000011" not in {of_latents.train_index.key(row) for row in range(len(of_latents.train_index))}
    for a, b in zip(of_images.reference_batches(9, 4), of_latents.reference_batches(9, 4), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["segmentation"], b["segmentation"])


def test_sizes_that_only_the_parquet_tells_spread_images_alike(source, tmp_path):
    """A parquet beside a shard is believed where it agrees with some images; it goes with the cache."""
    sizes = [SIZES[number % len(SIZES)] for number in range(12)]
    sizes[5] = (90, 30)  # not among those that are compared
    columns = {"key": [f"{number:06d}" for number in range(12)]}
    columns |= {name: [size[axis] for size in sizes] for axis, name in enumerate(("width", "height"))}
    columns["width"][4], columns["height"][4] = columns["height"][4], columns["width"][4]
    columns["width"][9], columns["height"][9] = columns["height"][9], columns["width"][9]
    pq.write_table(pa.table(columns), tmp_path / "shards" / "00000.parquet")
    assert cache(source, tmp_path / "latents") == 0
    images = module(source, bucket_unit=3).corpus
    latents = module(tmp_path / "latents" / "*.tar", LatentCache()).corpus
    assert images.training.index.dimensions(np.array([5])).tolist() == [[90, 30]]
    assert np.array_equal(images.training.buckets, latents.training.buckets)
    assert len(list(module(tmp_path / "latents" / "*.tar", LatentCache()).train_dataloader())) > 0


def test_what_a_shard_becomes_depends_on_that_shard_alone(source, tmp_path):
    assert cache(source, tmp_path / "one") == 0
    for index in (2, 0, 1):
        assert cache(source, tmp_path / "three", "--task-index", index, "--num-tasks", 3) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "three", names, shallow=False)[0] == names
    settings = json.loads((tmp_path / "one" / "manifest.json").read_text())["settings"]
    assert settings["shapes"] == [[32, 16], [24, 24], [16, 32]]


def test_samples_keep_their_order_however_many_are_sorted_by_shape_at_a_time(source, tmp_path, monkeypatch):
    assert cache(source, tmp_path / "once") == 0
    monkeypatch.setattr(latent_encoding, "_WINDOW", 2)
    assert cache(source, tmp_path / "often", "--batch-size", 3) == 0
    once, often = (list_of(tmp_path / name) for name in ("once", "often"))
    assert [key for key, _ in once] == [key for key, _ in often] == [f"{number:06d}" for number in range(36)]
    for (_, a), (_, b) in zip(once, often, strict=True):
        assert len(a) == len(b)
        assert a[:HEADER_SIZE] == b[:HEADER_SIZE]


def list_of(folder):
    """Key and `.latent` member of every sample, in the order of the cache."""
    index = build_index(sorted(map(str, folder.glob("*.tar"))), (IMAGE,))
    reader = ShardReader(index.paths)
    return [(index.key(row), index.read(reader, row, IMAGE)) for row in range(len(index))]


def test_an_image_of_unknown_size_keeps_its_place_in_no_bucket(source, tmp_path, capsys):
    broken = [("000050.png", b"no image"), ("000050.txt", b"x"), *members(51)]
    write_tar(tmp_path / "shards" / "00003.tar", broken)
    assert cache(source, tmp_path / "latents") == 0
    assert "000050: its width and height cannot be read" in capsys.readouterr().err
    for shards, latents in ((source, None), (tmp_path / "latents" / "*.tar", LatentCache())):
        with pytest.raises(ValueError, match="the size of 1 of 38 images is not known, row 36 being the first"):
            _ = module(shards, latents).train_index
        assert len(module(shards, latents, filters=[MinimumSize(1)]).train_index) == 37


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"buckets": None, "bucket_unit": 0}, "is null, which asks for the shapes 24x24,"),
        ({"buckets": AspectBuckets(4)}, "is set, which asks for the shapes 20x28, 24x24, 28x20,"),
        ({"buckets": AspectBuckets(8, 1.0)}, "is set, which asks for the shapes 24x24,"),
    ],
)
def test_other_shapes_than_those_of_the_cache_are_refused(source, tmp_path, options, found):
    assert cache(source, tmp_path / "latents") == 0
    message = rf"`data.buckets` {found} with cached latents; allowed is 16x32, 24x24, 32x16, .*change `data.buckets`"
    with pytest.raises(ValueError, match=message):
        _ = module(tmp_path / "latents" / "*.tar", LatentCache(), **options).latent_facts


def test_buckets_that_the_autoencoder_cannot_divide_and_other_shapes_in_one_folder_are_refused(
    source, tmp_path, capsys
):
    assert run(source, tmp_path / "out", "--image-size", SIZE, "--buckets", 6) == 2
    assert "the step of the buckets is 6; allowed are multiples of 4" in capsys.readouterr().err
    assert cache(source, tmp_path / "out") == 0
    assert cache(source, tmp_path / "out", "--max-ratio", 1) == 2
    assert "shapes: 16x32, 24x24, 32x16 -> 24x24" in capsys.readouterr().err
