"""Segmentation maps: they stay on their images, through crop, size, mirror and cache."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.data import ColourRegions, ImageTextDataModule, SegmentationMember, build_index
from ldm_train.data.crops import Shape
from ldm_train.data.segmentation import VOID, oklab
from ldm_train.data.transforms import resize_classes
from tests.data.conftest import encode, sample, write_tar

OPTIONS = {"image_size": 8, "batch_size": 4, "seed": 3}
GENERATOR = np.random.default_rng(5)


def with_maps(path, count=12):
    """Images of 40 x 16 whose grey is in proportion to the class."""
    members = []
    for number in range(count):
        classes = np.random.default_rng(number).integers(0, 25, (16, 40), dtype=np.uint8)
        image = encode(np.stack([10 * classes] * 3, -1))
        (name, _), metadata, caption = sample(number)
        members += [(name, image), metadata, caption, (name.replace(".png", ".seg.png"), encode(classes))]
    return str(write_tar(path, members))


def classes_shown(batch):
    return (batch["image"][:, 0] / 10).round().long()


@pytest.mark.parametrize("options", [{}, {"cache_decoded": True}, {"crop": "random", "num_workers": 1}])
def test_maps_follow_their_images(tmp_path, options):
    shards = with_maps(tmp_path / "a.tar")
    options = OPTIONS | {"image_size": 16, "flip": True} | options
    mapped = ImageTextDataModule(shards, **options, segmentation=SegmentationMember(25))
    plain = ImageTextDataModule(shards, **options)
    for _ in range(2):  # the second time from the cache
        for batch, same in zip(mapped.train_dataloader(), plain.train_dataloader(), strict=True):
            assert torch.equal(batch["image"], same["image"])
            assert batch["segmentation"].dtype == torch.int64
            assert torch.equal(batch["segmentation"], classes_shown(batch))


def test_maps_are_made_as_small_as_their_images(tmp_path):
    shards = with_maps(tmp_path / "a.tar")
    options = OPTIONS | {"crop": "random", "segmentation": SegmentationMember(25)}
    large = ImageTextDataModule(shards, **options | {"image_size": 16}).train_dataloader()
    small = ImageTextDataModule(shards, **options | {"image_size": 6}).train_dataloader()
    for whole, less in zip(large, small, strict=True):
        resized = [resize_classes(classes, Shape(6, 6)) for classes in whole["segmentation"]]
        assert torch.equal(less["segmentation"], torch.stack(resized))


def test_indexing_maps_changes_neither_rows_nor_fingerprint(tmp_path):
    path = with_maps(tmp_path / "a.tar")
    plain, mapped = build_index([path]), build_index([path], segmentation="seg.png")
    assert mapped.fingerprint == plain.fingerprint
    assert np.array_equal(mapped.columns.offsets[:, :3], plain.columns.offsets)
    assert np.array_equal(mapped.columns.sizes[:, :3], plain.columns.sizes)
    assert plain.columns.offsets.shape == (12, 3)


def test_samples_without_map_are_named(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", [*sample(0), *sample(1), ("000001.SEG.png", b"x")]))
    index = build_index([path], segmentation="seg.png")
    assert index.sample_id.tolist() == [0]
    assert index.key(0) == "000001"
    assert "000000: no segmentation map" in index.damage[0].reason


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_every_single_channel_png_gives_its_values(mode):
    classes = GENERATOR.integers(0, 2 if mode == "1" else 7, (5, 6)).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(classes, "L").convert("P")
        image.putdata(classes.ravel().tolist())
        image.putpalette([200, 30, 60] * 256)
    elif mode == "I;16":
        classes = classes.astype(np.uint16) * 700
        image = Image.fromarray(classes)
    else:
        image = Image.fromarray(classes * (255 if mode == "1" else 1)).convert(mode)
    decoded = SegmentationMember(5000).decode(encode(image), 5, 6)
    assert torch.equal(decoded, torch.from_numpy(classes.astype(np.int16)))


def test_void_is_no_class():
    classes = np.array([[0, 1], [255, 2]], np.uint8)
    assert SegmentationMember(3, void=255).decode(encode(classes), 2, 2).tolist() == [[0, 1], [VOID, 2]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(np.zeros((4, 5), np.uint8)), r"5 x 4 where the image is 6 x 4; both must be of one size; mend"),
        (encode(np.zeros((4, 6, 3), np.uint8)), r"channels RGB; allowed is a PNG of one channel.*; mend"),
        (encode(np.full((4, 6), 3, np.uint8)), r"value 3; allowed are 0 to 2; change `data.segmentation.num_classes`"),
        (encode(np.full((4, 6), 0, np.uint8), "JPEG"), "cannot identify"),
    ],
    ids=["size", "channels", "value", "no png"],
)
def test_maps_that_do_not_fit_are_refused(data, message):
    with pytest.raises((ValueError, OSError), match=message):
        SegmentationMember(3).decode(data, 4, 6)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: SegmentationMember(0), "num_classes"),
        (lambda: SegmentationMember(1 << 15), "num_classes"),
        (lambda: SegmentationMember(3, "seg.jpg"), "extension"),
        (lambda: SegmentationMember(3, ".png"), "extension"),
        (lambda: ColourRegions(12), "num_classes"),
        (lambda: ColourRegions(1), "num_classes"),
    ],
)
def test_impossible_arguments_are_refused(make, key):
    with pytest.raises(ValueError, match=f"allowed are .*; change `data.segmentation.{key}`"):
        make()


def test_resizing_takes_the_class_at_each_pixels_centre():
    classes = torch.from_numpy(GENERATOR.integers(0, 9, (12, 12)))
    assert torch.equal(resize_classes(classes, Shape(12, 12)), classes)
    assert torch.equal(resize_classes(classes, Shape(4, 4)), classes[1::3, 1::3])
    assert torch.equal(resize_classes(resize_classes(classes, Shape(36, 36)), Shape(12, 12)), classes)
    assert torch.equal(resize_classes(classes.flip(-1), Shape(4, 4)), resize_classes(classes, Shape(4, 4)).flip(-1))


def test_oklab_has_its_published_axes():
    grey = oklab(torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 3))
    assert grey[:, 1:].abs().max() < 1e-3
    assert (grey[:, 0].diff() > 0).all()
    torch.testing.assert_close(grey[[0, 255], 0], torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0)
    # The reference implementation's values for sRGB red, green and blue.
    primaries = oklab(255 * torch.eye(3, dtype=torch.uint8))
    expected = [[0.62796, 0.22486, 0.12585], [0.86644, -0.23389, 0.17950], [0.45201, -0.03246, -0.31153]]
    torch.testing.assert_close(primaries, torch.tensor(expected), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("term", "examples"),
    {
        "black": [(0, 0, 0), (20, 20, 25)],
        "white": [(255, 255, 255), (205, 205, 205)],
        "red": [(255, 0, 0), (200, 20, 20)],
        "green": [(0, 128, 0), (60, 179, 113)],
        "yellow": [(255, 255, 0), (255, 202, 40)],
        "blue": [(0, 0, 128), (30, 144, 255)],
        "brown": [(139, 69, 19), (110, 70, 40)],
        "purple": [(128, 0, 128), (148, 0, 211)],
        "pink": [(255, 192, 203), (255, 105, 180)],
        "orange": [(255, 140, 0), (255, 127, 40)],
        "grey": [(128, 128, 128), (105, 110, 105)],
    }.items(),
)
def test_colours_have_the_names_that_people_give_them(term, examples):
    regions = ColourRegions()
    pixels = torch.tensor(examples, dtype=torch.uint8).T[:, None]  # (3, 1, W)
    assert [regions.terms[index] for index in regions(pixels)[0]] == [term, term]


def test_fewer_terms_are_the_first_ones():
    pixels = torch.from_numpy(GENERATOR.integers(0, 256, (3, 16, 16), dtype=np.uint8))
    assert ColourRegions(4).terms == ("black", "white", "red", "green")
    few, all_terms = ColourRegions(4)(pixels), ColourRegions(11)(pixels)
    assert few.max() <= 3
    assert torch.equal(few[all_terms < 4], all_terms[all_terms < 4])


def test_regions_are_made_of_the_final_pixels(tmp_path):
    shards = with_maps(tmp_path / "a.tar")
    regions = ColourRegions()
    options = OPTIONS | {"flip": True, "crop": "random"}
    for batch in ImageTextDataModule(shards, **options, segmentation=regions).train_dataloader():
        expected = torch.stack([regions(image) for image in batch["image"]]).long()
        assert torch.equal(batch["segmentation"], expected)
