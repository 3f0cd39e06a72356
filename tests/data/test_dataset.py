import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.data import (
    BatchRequest,
    FieldCaption,
    ImageOptions,
    ImageTextDataModule,
    ImageTextDataset,
    Quarantine,
    RandomResizedCrop,
    SegmentationMember,
    Shape,
    ShuffledTags,
    TextCaption,
    TooManyBadSamplesError,
    build_index,
    expand_shards,
)
from ldm_train.data.index import CAPTION, IMAGE, METADATA
from ldm_train.data.transforms import cut, resize
from ldm_train.randomness import Stream, uniform
from tests.data.conftest import encode, sample, write_tar

WIDE = np.random.default_rng(1).integers(0, 256, (8, 24, 3), dtype=np.uint8)


def with_bad(tmp_path, count, bad):
    """Shards of `count` samples, of which those in `bad` hold no image."""
    members = []
    for number in range(count):
        image, *rest = sample(number)
        members += [(image[0], b"\x89PNG not really") if number in bad else image, *rest]
    return write_tar(tmp_path / "bad.tar", members)


def dataset_of(path, *, seed=0, fraction=1.0, quarantine=None, required=(IMAGE, CAPTION), **options):
    own = {name: options.pop(name) for name in ("shape_of", "cache") if name in options}
    source = options.get("segmentation")
    index = build_index(expand_shards(str(path)), required, source and source.extension)
    return ImageTextDataset(index, ImageOptions(8, **options), seed, Quarantine(quarantine, fraction, 0), **own)


def shard_of(path, *images, text="a, b, c, d, e"):
    """A shard of images, each with a map that repeats its red values."""
    members = []
    for number, image in enumerate(images):
        files = {"png": encode(image), "txt": text.encode(), "seg.png": encode(np.ascontiguousarray(image[..., 0]))}
        members += [(f"{number}.{extension}", data) for extension, data in files.items()]
    return write_tar(path, members)


def fetch(dataset, rows, epoch=0):
    return dataset[BatchRequest(epoch, np.asarray(rows), np.arange(len(rows)))]


def test_a_bad_sample_is_replaced_and_shifts_nothing(tmp_path):
    good, bad = dataset_of(with_bad(tmp_path, 12, ())), dataset_of(with_bad(tmp_path / "b", 12, {3}))
    expected, found = fetch(good, [1, 3, 5]), fetch(bad, [1, 3, 5])
    substitute = int(found["sample_id"][1])
    assert found["sample_id"].tolist() == [1, substitute, 5]
    assert substitute != 3
    assert torch.equal(found["image"][[0, 2]], expected["image"][[0, 2]])
    assert torch.equal(found["image"][1], fetch(good, [substitute])["image"][0])
    assert found["caption"][1] == f"caption {substitute}"
    assert found["position"].tolist() == [0, 1, 2]
    assert fetch(dataset_of(tmp_path / "b" / "bad.tar"), [3, 9])["sample_id"].tolist() == [substitute, 9]
    assert {int(fetch(bad, [3], epoch)["sample_id"]) for epoch in range(6)} != {substitute}


def test_failures_are_counted_and_each_is_named_once(tmp_path):
    dataset = dataset_of(with_bad(tmp_path, 12, {3, 4}), quarantine=tmp_path / "quarantine" / "training-rank0")
    for epoch in range(2):
        fetch(dataset, [0, 3, 4, 5], epoch)
    lines = (tmp_path / "quarantine" / "training-rank0-worker0.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert {entry["key"] for entry in entries} == {"bad/000003", "bad/000004"}
    assert len(entries) == 2
    assert all("UnidentifiedImageError" in entry["error"] for entry in entries)
    assert dataset.quarantine.seen == 8
    assert dataset.quarantine.bad >= 4


def test_too_many_failures_stop_the_run(tmp_path):
    dataset = dataset_of(with_bad(tmp_path, 40, set(range(0, 40, 4))), fraction=0.1)
    with pytest.raises(TooManyBadSamplesError, match=r"11 of 12 samples .*10.00% may fail.*`data.max_bad_fraction`"):
        fetch(dataset, [4] * 12)
    tolerant = dataset_of(tmp_path / "bad.tar", fraction=0.5)
    for epoch in range(12):
        assert len(fetch(tolerant, range(40), epoch)["key"]) == 40
    hopeless = dataset_of(with_bad(tmp_path / "all", 3, {0, 1, 2}))
    with pytest.raises(TooManyBadSamplesError):
        fetch(hopeless, [0])


def test_failures_in_workers_are_counted_in_the_main_process(tmp_path):
    path = with_bad(tmp_path, 12, {3})
    options = {"image_size": 8, "batch_size": 2, "seed": 0, "quarantine_dir": str(tmp_path / "quarantine")}
    datamodule = ImageTextDataModule(str(path), num_workers=2, **options)
    batches = list(datamodule.train_dataloader())
    alone = list(ImageTextDataModule(str(path), **options).train_dataloader())
    assert [batch["key"] for batch in batches] == [batch["key"] for batch in alone]
    assert datamodule.bad_samples >= 1
    assert "000003" in "".join(file.read_text() for file in (tmp_path / "quarantine").glob("*.jsonl"))


def test_augmentation_belongs_to_the_sample_and_the_epoch(tmp_path):
    members = [m for number in range(16) for m in ((f"{number:02d}.png", encode(WIDE)), (f"{number:02d}.txt", b""))]
    path = write_tar(tmp_path / "a.tar", members)
    dataset = dataset_of(path, flip=True, crop="random")
    together = fetch(dataset, range(16))["image"]
    apart = torch.cat([fetch(dataset, [row])["image"] for row in reversed(range(16))]).flip(0)
    assert torch.equal(together, apart)
    assert len(torch.unique(together, dim=0)) > 8  # 17 places times 2
    assert not torch.equal(together, fetch(dataset, range(16), epoch=1)["image"])
    assert not torch.equal(together, fetch(dataset_of(path, seed=1, flip=True, crop="random"), range(16))["image"])
    plain = fetch(dataset_of(path), range(16))["image"]
    assert len(torch.unique(plain, dim=0)) == 1
    assert torch.equal(plain[0], torch.from_numpy(WIDE[:, 8:16]).permute(2, 0, 1))


def test_half_of_the_images_are_flipped(tmp_path):
    members = [m for n in range(400) for m in ((f"{n:03d}.png", encode(WIDE[:, :8])), (f"{n:03d}.txt", b""))]
    dataset = dataset_of(write_tar(tmp_path / "a.tar", members), flip=True)
    images = fetch(dataset, range(400))["image"]
    mirrored = (images == images[0].flip(-1)).flatten(1).all(1).float().mean().item()
    assert min(mirrored, 1 - mirrored) > 0.4  # four standard deviations of a fair coin


def test_captions_come_from_the_chosen_place(tmp_path):
    members = [
        *sample(0),
        *sample(1, text="  ünï  "),
        sample(2)[0],
        ("000002.txt", b" two\n"),
        *sample(3, text=4),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert fetch(dataset_of(path), [0, 2])["caption"] == ["caption 0", "two"]
    fields = dataset_of(path, required=(IMAGE, METADATA), caption=FieldCaption("text"))
    batch = fetch(fields, [0, 1, 2])
    assert batch["caption"][:2] == ["field 0", "ünï"]
    assert int(batch["sample_id"][2]) != 2  # its field is a number, not a text
    assert fields.quarantine.bad >= 1


def test_captions_that_are_no_text_are_bad_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample(0), sample(1)[0], ("000001.txt", b"\xff\xfe\xfa")])
    dataset = dataset_of(path)
    assert fetch(dataset, [0, 1])["sample_id"].tolist() == [0, 0]
    assert dataset.quarantine.bad >= 1


def test_the_same_numbers_are_drawn_as_ever(tmp_path):
    path = shard_of(tmp_path / "a.tar", *[WIDE] * 16)
    dataset = dataset_of(path, flip=True, crop="random")
    images = fetch(dataset, range(16), epoch=3)["image"]
    draws = uniform(0, 3, torch.arange(16), Stream.AUGMENTATION, (2,))
    for image, (place, flip) in zip(images, draws.tolist(), strict=True):
        expected = torch.from_numpy(WIDE).permute(2, 0, 1)[..., (begin := int(place * 17)) : begin + 8]
        assert torch.equal(image, expected.flip(-1) if flip < 0.5 else expected)
    resized = dataset_of(path, flip=True, crop=RandomResizedCrop())
    more = uniform(0, 3, torch.arange(16), Stream.AUGMENTATION, (5,))
    assert torch.equal(more[:, :2], draws)
    for image, row in zip(fetch(resized, range(16), epoch=3)["image"], more.tolist(), strict=True):
        box = RandomResizedCrop()(Shape(8, 24), Shape(8, 8), row)
        expected = resize(cut(torch.from_numpy(WIDE).permute(2, 0, 1), box), Shape(8, 8))
        assert torch.equal(image, expected.flip(-1) if row[1] < 0.5 else expected)


def test_batches_have_the_shape_of_their_bucket(tmp_path):
    tall = WIDE.transpose(1, 0, 2)
    path = shard_of(tmp_path / "a.tar", WIDE, WIDE, tall, tall)
    shapes = [Shape(8, 16), Shape(8, 16), Shape(16, 8), Shape(16, 8)]
    dataset = dataset_of(path, shape_of=shapes.__getitem__)
    wide, high = fetch(dataset, [0, 1]), fetch(dataset, [2, 3])
    assert wide["image"].shape == (2, 3, 8, 16)
    assert torch.equal(wide["image"][0], torch.from_numpy(WIDE[:, 4:20]).permute(2, 0, 1))
    assert torch.equal(high["image"], wide["image"].transpose(-1, -2))
    assert (wide["crop"].tolist(), high["crop"].tolist()) == ([[0, 4]] * 2, [[4, 0]] * 2)
    assert wide["original_size"].tolist() == [[8, 24]] * 2
    with pytest.raises(ValueError, match=r"a batch of 2 images has the shapes .*; all .* one bucket; .*`data.buckets`"):
        fetch(dataset, [1, 2])


def test_turned_and_substituted_images_come_in_the_bucket_of_the_row_all_the_same(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored as wide, shown as tall
    turned = encode(WIDE, exif=exif)
    bad = ("1.png", b"\x89PNG not really")
    path = write_tar(tmp_path / "a.tar", [("0.png", turned), ("0.txt", b""), bad, ("1.txt", b"")])
    batch = fetch(dataset_of(path, shape_of=lambda row: Shape(8, 16)), [0, 1])
    assert batch["image"].shape == (2, 3, 8, 16)
    assert batch["sample_id"].tolist() == [0, 0]
    assert batch["original_size"].tolist() == [[24, 8]] * 2
    assert batch["crop"].tolist() == [[20, 0]] * 2  # twice as wide, 16 x 48, of which 20 rows are above


def test_maps_are_cut_and_mirrored_like_their_images(tmp_path):
    path = shard_of(tmp_path / "a.tar", *[WIDE] * 12)
    source = SegmentationMember(256)
    for crop in ("center", "random", RandomResizedCrop((0.3, 1.0))):
        options = {"crop": crop, "flip": True, "segmentation": source, "shape_of": lambda row: Shape(4, 6)}
        assert fetch(dataset_of(path, **options), range(12))["segmentation"].shape == (12, 4, 6)
    exact = dataset_of(path, crop="random", flip=True, segmentation=source)
    batch = fetch(exact, range(12))
    assert torch.equal(batch["segmentation"], batch["image"][:, 0].long())


def test_what_is_cut_off_is_known_and_mirrored_with_the_image(tmp_path):
    path = shard_of(tmp_path / "a.tar", *[WIDE] * 32)
    dataset = dataset_of(path, crop="random", flip=True)
    batch = fetch(dataset, range(32))
    draws = uniform(0, 0, torch.arange(32), Stream.AUGMENTATION, (2,))
    mirrored, whole = draws[:, 1] < 0.5, torch.from_numpy(WIDE).permute(2, 0, 1)
    assert 4 < mirrored.sum() < 28
    for image, (top, left), is_mirrored in zip(batch["image"], batch["crop"].tolist(), mirrored, strict=True):
        seen = whole.flip(-1) if is_mirrored else whole
        assert torch.equal(image, seen[:, top : top + 8, left : left + 8])
    assert batch["original_size"].tolist() == [[8, 24]] * 32


def test_cached_samples_get_another_caption_in_each_epoch(tmp_path):
    source = ShuffledTags(TextCaption(), keep=0)
    path = shard_of(tmp_path / "a.tar", *[WIDE] * 4)
    cached, fresh = dataset_of(path, caption=source, cache={}), dataset_of(path, caption=source)
    said = [fetch(cached, range(4), epoch)["caption"] for epoch in range(3)]
    assert said == [fetch(fresh, range(4), epoch)["caption"] for epoch in range(3)]
    assert len({caption for captions in said for caption in captions}) > 6
    plain = ImageTextDataset(cached.index, cached.options.plain(), 0, Quarantine(None, 1.0, 0))
    assert {*fetch(plain, range(4))["caption"]} == {"a, b, c, d, e"}
    assert fetch(fresh, [2, 0], 1)["caption"] == [said[1][2], said[1][0]]  # of the sample, not of the batch


def test_lists_of_captions_need_no_text_member(tmp_path):
    members = [("0.png", encode(WIDE)), ("0.json", json.dumps({"many": ["x", "y"]}).encode())]
    path = write_tar(tmp_path / "a.tar", members)
    dataset = dataset_of(path, required=(IMAGE, METADATA), caption=FieldCaption("many"))
    assert {fetch(dataset, [0], epoch)["caption"][0] for epoch in range(20)} == {"x", "y"}


def test_a_reducing_gap_changes_how_a_jpeg_is_decoded_and_nothing_else(tmp_path):
    """A smooth picture of 8 times the size looks the same; where fewer pixels are there, every byte is."""
    ramp = np.linspace(0, 200, 96)[:, None, None] + np.linspace(0, 50, 64)[None, :, None] * np.array([1.0, 0.5, 0.0])
    large, small = ramp.round().astype(np.uint8), ramp[::12, ::8].round().astype(np.uint8)
    members = []
    for number, picture in enumerate((large, small)):
        data = encode(picture, "JPEG", quality=98, subsampling=0)
        members += [(f"{number}.jpg", data), (f"{number}.txt", b"")]
    path = write_tar(tmp_path / "a.tar", members)
    options = {"crop": RandomResizedCrop((0.7, 1.0)), "flip": True}
    whole, reduced = (fetch(dataset_of(path, **options, **more), [0, 1]) for more in ({}, {"reducing_gap": 1.0}))
    difference = (whole["image"].float() - reduced["image"].float()).abs().amax((1, 2, 3))
    assert 0 < difference[0] <= 8
    assert difference[1] == 0
    for name in ("original_size", "crop", "sample_id"):
        assert torch.equal(whole[name], reduced[name])
