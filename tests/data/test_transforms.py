import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ldm_train.data import transforms
from ldm_train.data.crops import Shape
from ldm_train.data.transforms import (
    ImageTooLargeError,
    center_square,
    decode_reduced,
    decode_rgb,
    plain_jpeg_size,
    resize,
    to_signed_unit,
)
from tests.data.conftest import encode

GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.integers(0, 256, (12, 20, 3), dtype=np.uint8)
SMOOTH = np.stack([*np.meshgrid(np.linspace(20, 220, 48), np.linspace(30, 200, 32)), np.full((32, 48), 90.0)], -1)
SMOOTH = SMOOTH.round().astype(np.uint8)


def decoded(data):
    return decode_rgb(data).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_come_back_exactly(kind, options):
    assert np.array_equal(decoded(encode(NOISE, kind, **options)), NOISE)


@pytest.mark.parametrize(
    "options", [{"quality": 95}, {"quality": 95, "progressive": True}, {"quality": 95, "subsampling": 0}]
)
def test_jpeg_is_close_and_equals_pillow(options):
    data = encode(SMOOTH, "JPEG", **options)
    assert np.abs(decoded(data).astype(int) - SMOOTH).max() <= 6
    assert np.abs(decoded(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))).max() <= 2


def test_both_routes_give_the_same_pixels(monkeypatch):
    data = [encode(NOISE), encode(NOISE, "WEBP", lossless=True), encode(NOISE[..., 0])]
    plain = [decoded(file) for file in data]
    monkeypatch.setattr(transforms, "_is_plain", lambda image: False)
    monkeypatch.setattr(transforms, "plain_jpeg_size", lambda data: None)
    assert all(np.array_equal(a, decoded(file)) for a, file in zip(plain, data, strict=True))


@pytest.mark.parametrize("by", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(64, 96), (61, 90), (7, 5)])
def test_a_reduced_jpeg_is_the_whole_one_averaged(by, shape):
    """The lowest frequencies of a block are nearly the means over its parts, exactly so of smooth pictures."""
    rows, columns = np.meshgrid(*(np.linspace(0, 2, side) for side in shape), indexing="ij")
    smooth = np.stack([127 + 90 * np.sin(rows + 2 * columns), 127 + 90 * np.cos(3 * rows), 60 + 60 * columns], -1)
    data = encode(smooth.round().astype(np.uint8), "JPEG", quality=98, subsampling=0)
    pixels, size, found = decode_reduced(data, lambda size: by)
    assert (size, found) == (shape, by)
    assert pixels.shape == (3, *(-(-side // by) for side in shape))
    whole = decode_rgb(data).float()
    means = torch.nn.functional.avg_pool2d(whole, by, ceil_mode=True)
    inner = tuple(slice(0, side // by) for side in shape)
    difference = (pixels.float() - means)[:, *inner]
    assert difference.numel() == 0 or difference.abs().max() <= 4


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "WEBP", "lossless": True}, {"exif": True}])
def test_what_is_no_plain_jpeg_is_never_reduced(options):
    if options.pop("exif", False):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 3
    options = {"format": "JPEG"} | options
    data = encode(SMOOTH, options.pop("format"), **options)
    pixels, size, by = decode_reduced(data, lambda size: 8)
    assert (size, by) == ((32, 48), 1)
    assert torch.equal(pixels, decode_rgb(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_stand_upright(orientation, kind):
    operation = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Image.Transpose that undoes what a viewer will do
    stored = Image.fromarray(SMOOTH)
    if orientation > 1:
        stored = stored.transpose(operation[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    found = decoded(encode(stored, kind, exif=exif, **options))
    assert found.shape == SMOOTH.shape
    assert np.abs(found.astype(int) - SMOOTH).max() <= 3


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_transparency_lies_over_white(kind, options):
    alpha = np.linspace(0, 255, NOISE[..., 0].size).reshape(NOISE.shape[:2]).round().astype(np.uint8)
    found = decoded(encode(np.dstack([NOISE, alpha]), kind, **options))
    share = alpha[..., None] / 255
    assert np.abs(found - (NOISE * share + 255 * (1 - share))).max() <= 1
    assert (found[0, 0] == 255).all()


def test_transparent_palettes_and_colours_lie_over_white():
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    found = decoded(encode(palette, transparency=0))
    assert found[0, 0].tolist() == [255] * 3
    assert found[1, 1].tolist() == [40, 50, 60]
    assert decoded(encode(palette))[0, 0].tolist() == [10, 20, 30]
    coloured = decoded(encode(np.full((2, 2, 3), 9, dtype=np.uint8), transparency=(9, 9, 9)))
    assert (coloured == 255).all()
    grey = Image.fromarray(np.array([[0, 100]], dtype=np.uint8))
    assert decoded(encode(grey, transparency=0))[0].tolist() == [[255] * 3, [100] * 3]
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)])
    assert decoded(encode(grey_alpha))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_three_equal_channels(mode):
    grey = Image.fromarray(NOISE).convert(mode)
    expected = np.repeat(np.asarray(grey.convert("L"))[..., None], 3, axis=2)
    assert np.array_equal(decoded(encode(grey)), expected)


def test_sixteen_bits_keep_the_high_eight():
    values = np.arange(0, 65536, 257 * 5, dtype=np.uint16).reshape(4, -1)
    assert np.array_equal(decoded(encode(values))[..., 0], values >> 8)
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    colour = b"\x89PNG\r\n\x1a\n" + b"".join(
        map(chunk, (b"IHDR", b"IDAT", b"IEND"), (header, zlib.compress(rows), b""))
    )
    assert np.array_equal(decoded(colour)[..., 1], values >> 8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_cmyk_is_converted():
    data = encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decoded(data).astype(int) - SMOOTH).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert (decoded(data) == [200, 0, 0]).all()


def test_huge_claims_are_refused_before_decoding():
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )
    begin = time.perf_counter()
    with pytest.raises((ImageTooLargeError, Image.DecompressionBombError)):
        decode_rgb(bomb)
    assert time.perf_counter() - begin < 0.5
    with pytest.raises(ImageTooLargeError, match=r"20 x 12 pixels are more than data.max_pixels=239"):
        decode_rgb(encode(NOISE), max_pixels=239)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_raise(kind):
    data = encode(NOISE, kind)
    for broken in (b"", b"text", data[: len(data) // 2], data[:20]):
        with pytest.raises((OSError, ValueError, RuntimeError, SyntaxError)):
            decode_rgb(broken)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind):
    with pytest.raises(OSError, match="cannot identify"):
        decode_rgb(encode(NOISE, kind))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_keeps_constants_means_and_equal_sizes(interpolation):
    noise = torch.from_numpy(GENERATOR.integers(0, 256, (3, 64, 64), dtype=np.uint8))
    assert torch.equal(resize(noise, Shape(64, 64), interpolation), noise)
    assert (resize(torch.full((3, 50, 50), 77, dtype=torch.uint8), Shape(16, 12), interpolation) == 77).all()
    small = resize(noise, Shape(8, 8), interpolation).float()
    assert abs(small.mean() - noise.float().mean()) < 2
    # Antialiasing averages 64 pixels: the deviation falls to about an eighth.
    assert small.std() < noise.float().std() / 4
    exact = torch.nn.functional.interpolate(noise[None].double(), (8, 8), mode=interpolation, antialias=True)[0]
    assert (small - exact.clamp(0, 255)).abs().max() <= 1.5


def test_signed_unit_is_exact_at_the_ends_and_invertible():
    values = torch.arange(256, dtype=torch.uint8)
    signed = to_signed_unit(values)
    assert (signed[0], signed[255], signed.dtype) == (-1.0, 1.0, torch.float32)
    assert torch.equal(((signed + 1) * 127.5).round().to(torch.uint8), values)
    assert torch.equal(signed, -signed.flip(0))
    exact = (2 * values.double() - 255) / 255
    assert (signed.double() - exact).abs().max() < 2**-23


def test_the_center_square_is_cut_before_it_is_resized():
    wide = torch.zeros(3, 10, 30, dtype=torch.uint8)
    wide[..., 10:20] = 200
    assert (center_square(wide, 5) == 200).all()
    assert torch.equal(center_square(wide, 10), wide[..., 10:20])


JPEGS = {
    "baseline": (SMOOTH, {}),
    "progressive": (SMOOTH, {"progressive": True}),
    "grey": (SMOOTH[..., 0], {}),
    "commented": (SMOOTH, {"comment": b"\xff\xda\xff\xc0 no marker"}),
    "profile": (SMOOTH, {"icc_profile": bytes(70_000)}),  # more than one segment
    "thumbnail": (SMOOTH, {"extra": b"\xff\xe1\x00\x08XMPdat"}),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_plain_jpegs_are_known_by_their_markers(kind):
    pixels, options = JPEGS[kind]
    assert plain_jpeg_size(encode(pixels, "JPEG", **options)) == (48, 32)


def test_what_needs_care_is_left_to_pillow():
    exif = Image.Exif()
    exif[0x0112] = 6
    two = {"save_all": True, "append_images": [Image.fromarray(SMOOTH)]}
    careful = [
        encode(SMOOTH, "JPEG", exif=exif),
        encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
        encode(SMOOTH, "MPO", **two),
        encode(SMOOTH, "PNG"),
        encode(SMOOTH, "WEBP"),
        b"",
        b"\xff\xd8",
        encode(SMOOTH, "JPEG")[:100],
    ]
    assert [plain_jpeg_size(data) for data in careful] == [None] * len(careful)
    assert np.abs(decoded(careful[2]).astype(int) - SMOOTH).max() <= 12


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64))
def test_any_bytes_have_a_size_or_none(data):
    assert plain_jpeg_size(b"\xff\xd8" + data) is None or len(data) >= 4


def test_colour_profiles_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(decoded(encode(NOISE, icc_profile=profile)), NOISE)
    plain, tagged = (encode(SMOOTH, "JPEG", **options) for options in ({}, {"icc_profile": profile}))
    assert np.array_equal(decoded(plain), decoded(tagged))


def test_cut_jpegs_are_refused_and_never_half_grey():
    for options in ({}, {"progressive": True}):
        data = encode(SMOOTH, "JPEG", quality=95, **options)
        for share in (0.5, 0.8, 0.95):
            with pytest.raises((OSError, RuntimeError)):
                decode_rgb(data[: int(len(data) * share)])


def test_pngs_with_a_wrong_checksum_are_refused():
    data = bytearray(encode(NOISE))
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode_rgb(bytes(data))


def test_inverted_cmyk_of_adobe_is_no_negative():
    # Pillow writes CMYK as Adobe's programs do: inverted, and marked as such.
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(decoded(data)[8, 8].astype(int) - [255, 0, 0]).max() <= 6


def test_small_palettes_and_half_transparent_frames():
    two_bits = Image.fromarray((NOISE[..., 0] // 64).astype(np.uint8)).convert("P")
    assert np.array_equal(decoded(encode(two_bits, bits=2)), np.asarray(two_bits.convert("RGB")))
    clear, solid = Image.new("RGBA", (6, 6), (200, 0, 0, 0)), Image.new("RGBA", (6, 6), (0, 200, 0, 255))
    data = encode(clear, "WEBP", save_all=True, append_images=[solid], duration=100, lossless=True)
    assert (decoded(data) == 255).all()
