"""Cached latents: the posterior's moments of every image, encoded once, in shards beside the captions.

    z = mean + exp(log variance / 2) noise,   (mean, log variance) = E(image)

The encoder E is frozen in stage 2, and at 512 pixels it is half of a step's arithmetic. What is kept is what E says
before anything is drawn, normalised or scaled: every epoch draws anew, and latents may be measured again (calibrated)
without another cache. A cache has the layout of the shards that it was made of:

    00000.tar            <key>.latent  <key>.txt  <key>.json    names, keys and order are the source's
    00000_latents.json   what became of that shard
    manifest.json        of all: the encoder, how images were made, the range of their values, the source

A sample that could not be decoded keeps its place, and its member says why. So a row of the cache is the same row of
the source: sample ids, order, noise and substitutes of a run are those of a run on the images.

A `.latent` member: a header of 64 bytes, then (V, k C, h, w) little-endian numbers; version 0 is the image as it is,
version 1 its mirror image. Letters: V versions, C latent channels, k moments per channel, h and w size of the latents.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch, LatentFacts
from ldm_train.data.crops import Box, Shape, crop_of, margins
from ldm_train.data.dataset import Draws, ImageOptions, ImageTextDataset, Sample
from ldm_train.data.index import IMAGE, ShardIndex, build_index
from ldm_train.data.locations import expand_shards

EXTENSION = "latent"
MANIFEST = "manifest.json"
VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_MAGIC = b"LATENTS\1"
_HEADER = struct.Struct("<8s4H8I16x")  # magic; dtype, V, k C, unused; h, w, source size, crop box
_CODES = {name: code for code, name in enumerate(DTYPES, start=1)}
_NAMES = {code: name for name, code in _CODES.items()}
_TOOL = "python tools/cache_latents.py --checkpoint AUTOENCODER --data SHARDS --image-size SIZE --output FOLDER"
# A bicubic resize of bytes ends in bytes: no value lies outside by more than rounding.
_TOLERANCE = 1e-3
_COMPARED = 256  # keys that must agree where images and their latents are taken for the same samples


class DamagedSampleError(ValueError):
    """The image of this sample could not be decoded when the cache was made."""


class Cached(NamedTuple):
    """What a `.latent` member holds.

    Attributes:
        moments: (V, k C, h, w), of the type they are stored in.
        source_size: height and width of the upright source image in pixels.
        box: what was cut out of it, in its pixels.
    """

    moments: Tensor
    source_size: Shape
    box: Box


@dataclass(frozen=True)
class LatentSettings:
    """What the values in a cache depend on besides the images.

    Attributes:
        encoder: sha256 of the encoder's weights, see `ldm_train.checkpoint.encoder_digest`.
        image_size: side of the square images in pixels.
        factor: f, by which the encoder makes them smaller.
        latent_channels: C.
        moments_per_channel: k.
        dtype: type of the stored numbers, a key of `DTYPES`.
        precision: type in which the encoder ran.
        crop: where squares were cut out of the images.
        flip: whether mirrored images are kept beside the others.
        interpolation: of the resize.
    """

    encoder: str
    image_size: int
    factor: int
    latent_channels: int
    moments_per_channel: int
    dtype: str
    precision: str = "float32"
    crop: str = "center"
    flip: bool = False
    interpolation: str = "bicubic"

    def differences(self, other: "LatentSettings") -> list[str]:
        """`name: ours -> theirs` of every setting that differs."""
        own, others = asdict(self), asdict(other)
        return [f"{name}: {value} -> {others[name]}" for name, value in own.items() if others[name] != value]


@dataclass(frozen=True)
class Manifest:
    """A cache as a whole.

    Attributes:
        folder: where it lies.
        settings: what its values depend on.
        image_range: least and largest value of the images as they were encoded.
        source_root: the folder that holds all source shards.
        shards: name of each shard, relative to the folder -> its bytes.
    """

    folder: Path
    settings: LatentSettings
    image_range: tuple[float, float]
    source_root: Path
    shards: Mapping[str, int]


def pack(moments: Tensor, source_size: Shape, box: Box) -> bytes:
    """A `.latent` member of moments (V, k C, h, w) on the host; see `Cached` for the rest."""
    name = str(moments.dtype).removeprefix("torch.")
    versions, channels, height, width = moments.shape
    header = _HEADER.pack(_MAGIC, _CODES[name], versions, channels, 0, height, width, *source_size, *box)
    return header + moments.contiguous().view(torch.uint8).numpy().tobytes()


def pack_failure(reason: str) -> bytes:
    """The member of a sample that has no moments, and why."""
    return _HEADER.pack(_MAGIC, *[0] * 12) + reason.encode()


def unpack(data: bytes) -> Cached:
    """Read a `.latent` member.

    Raises:
        DamagedSampleError: if it says that there are no moments.
        ValueError: if it is no such member, or cut.
    """
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise ValueError(
            f"{len(data)} bytes that are no cached latents; allowed are `.latent` members; make them by {_TOOL}"
        )
    _, code, versions, channels, _, height, width, *place = _HEADER.unpack_from(data)
    if versions == 0:
        raise DamagedSampleError(data[_HEADER.size :].decode(errors="replace"))
    dtype, count = DTYPES[_NAMES[code]], versions * channels * height * width
    if len(data) != _HEADER.size + count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes where {count} numbers of {dtype} belong: the member is cut")
    values = torch.frombuffer(bytearray(data), dtype=dtype, offset=_HEADER.size)
    return Cached(values.view(versions, channels, height, width), Shape(*place[:2]), Box(*place[2:]))


def read_manifest(folder: Path) -> Manifest:
    """Read a cache's manifest.

    Raises:
        ValueError: if it is of another version, or damaged.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"it has version {content['version']}, this program reads {VERSION}")
        known = {field.name for field in fields(LatentSettings)}
        settings = LatentSettings(**{name: value for name, value in content["settings"].items() if name in known})
        images, shards = content["images"], {shard["name"]: shard["size"] for shard in content["shards"]}
        return Manifest(folder, settings, (images["min"], images["max"]), Path(content["source"]["root"]), shards)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no manifest of cached latents ({error}); allowed is what the tool writes; make the cache anew "
            f"by {_TOOL} --overwrite, or change `data.shards`"
        ) from error


def manifests_of(paths: Sequence[str]) -> dict[str, Manifest]:
    """Path -> manifest of its cache, which lies in the shard's folder or the nearest one above it that has one.

    Raises:
        ValueError: if there is none, or a shard is not as the manifest says.
    """
    of_folder: dict[Path, Manifest] = {}
    found: dict[str, Manifest] = {}
    for path in paths:
        start = Path(os.path.abspath(path)).parent
        if start not in of_folder:
            of_folder[start] = read_manifest(_folder_above(start))
        manifest = found[path] = of_folder[start]
        name, size = os.path.relpath(path, manifest.folder), os.path.getsize(path)
        if manifest.shards.get(name) != size:
            raise ValueError(
                f"{path} has {size} bytes, its cache's {MANIFEST} says {manifest.shards.get(name, 'nothing of it')}; "
                "allowed are shards as the tool left them; run it again with --overwrite, or change `data.shards`"
            )
    return found


def _folder_above(start: Path) -> Path:
    folder = next((folder for folder in (start, *start.parents) if (folder / MANIFEST).is_file()), None)
    if folder is None:
        raise ValueError(
            f"there is no {MANIFEST} in {start}; allowed are the shards of a finished cache; change `data.shards`, "
            f"finish the cache by the tool's --merge, or make one: {_TOOL}"
        )
    return folder


class LatentCache:
    """Says that `data.shards` are cached latents, which batches then hold as `moments` instead of an `image`.

    Args:
        reference_shards: the images themselves, for what compares with real ones (samples, Frechet distances); None
            takes those the cache was made of.
    """

    def __init__(self, reference_shards: str | Sequence[str] | None = None) -> None:
        self.reference_shards = reference_shards

    def facts(self, paths: Sequence[str], options: ImageOptions) -> LatentFacts:
        """What a stage has to know of the cache, or the caches of one kind, that shards belong to.

        Args:
            paths: the shards.
            options: how the run wants its images.

        Raises:
            ValueError: if a cache was not made like that, or of images that were not in [-1, 1], or if two differ.
        """
        caches = {manifest.folder: manifest for manifest in manifests_of(paths).values()}
        first, *others = [self._facts(manifest, options) for manifest in caches.values()]
        for other in others:
            if other[1:] != first[1:]:
                raise ValueError(
                    f"{first.folder} and {other.folder} hold latents of different encoders ({first.encoder[:12]} and "
                    f"{other.encoder[:12]}); allowed is one; change `data.shards`, `data.val_shards` or `data.mixture`"
                )
        return first

    def _facts(self, manifest: Manifest, options: ImageOptions) -> LatentFacts:
        settings, (low, high) = manifest.settings, manifest.image_range
        if low < -1.0 - _TOLERANCE or high > 1.0 + _TOLERANCE:
            raise ValueError(
                f"the images of {manifest.folder} had values from {low:g} to {high:g} when they were encoded; allowed "
                f"is [-1, 1], which the autoencoder was trained on; make the cache anew: {_TOOL} --overwrite"
            )
        _check(options.segmentation is None, "segmentation", "a source of maps", "null: latents have no pixels")
        _check(options.image_size == settings.image_size, "image_size", options.image_size, settings.image_size)
        crop = crop_of(options.crop)
        _check(type(crop) is type(crop_of(settings.crop)), "crop", type(crop).__name__, settings.crop)
        _check(settings.flip or not options.flip, "flip", options.flip, "false: the cache was made without --flip")
        interpolation = options.interpolation
        _check(interpolation == settings.interpolation, "interpolation", interpolation, settings.interpolation)
        return LatentFacts(
            str(manifest.folder),
            settings.encoder,
            settings.factor,
            settings.latent_channels,
            settings.moments_per_channel,
        )

    def images_of(self, cached: ShardIndex, required: Sequence[int]) -> ShardIndex:
        """The images of the rows of a cache.

        Args:
            cached: the rows.
            required: the kinds of members without which a sample is incomplete, as in the cache.

        Raises:
            FileNotFoundError: see `reference_paths`.
            ValueError: if they are not the same samples.
        """
        return image_rows(cached, build_index(self.reference_paths(cached.paths), required))

    def reference_paths(self, paths: Sequence[str]) -> tuple[str, ...]:
        """The shards with the images that cached ones were made of, in the same order.

        Raises:
            FileNotFoundError: if they are not there any more, and no others are named.
        """
        if self.reference_shards is not None:
            return expand_shards(self.reference_shards, "data.latents.reference_shards")
        manifests = manifests_of(paths)
        sources = [str(m.source_root / os.path.relpath(path, m.folder)) for path, m in manifests.items()]
        missing = [path for path in sources if not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(
                f"real images are asked for, and {missing[0]}, which the cache was made of, "
                "is not there; allowed are the same shards elsewhere; set `data.latents.reference_shards` to them, or "
                "do without by `callbacks.samples=null`"
            )
        return tuple(sources)


def _check(is_allowed: bool, key: str, found: object, allowed: object) -> None:
    if not is_allowed:
        raise ValueError(
            f"`data.{key}` is {found} with cached latents; allowed is {allowed}, as the cache was made; change "
            f"`data.{key}`, or make another cache: {_TOOL}"
        )


def image_rows(cached: ShardIndex, images: ShardIndex) -> ShardIndex:
    """The rows of the images that are those of the cached latents, in the same order.

    Args:
        cached: rows of caches, after any selection.
        images: all rows of the shards with the images.

    Raises:
        ValueError: if they are not the same samples.
    """
    kept = np.zeros(len(images), dtype=bool)
    is_same = len(images) == len(cached.columns)
    if is_same:
        kept[np.asarray(cached.sample_id[:])] = True
        found = images.select(kept, "the cached ones")
        some = np.unique(np.linspace(0, len(cached) - 1, _COMPARED).astype(np.int64)).tolist()
        is_same = all(found.key(row) == cached.key(row) for row in some)
    if not is_same:
        raise ValueError(
            f"the {len(images)} real images are not the {len(cached.columns)} samples of the cache; allowed are the "
            "shards it was made of, in the same order; change `data.latents.reference_shards`"
        )
    return found


class LatentTextDataset(ImageTextDataset):
    """Batches of an index of cached latents: as of images, but `moments` takes the place of `image`.

    Arguments as in `ImageTextDataset`. What a sample keeps as its image are the moments (V, k C, h, w).
    """

    def _make(self, row: int, draws: Draws, shape: Shape) -> Sample:
        cached = unpack(self.index.read(self.reader, row, IMAGE))
        cut_off = margins(cached.source_size, cached.box, shape)
        return Sample(cached.moments, *self._texts(row), None, cached.source_size, cut_off)

    def _put(self, batch: ImageTextBatch, samples: Sequence[Sample], mirrorings: Sequence[bool]) -> None:
        pairs = zip(samples, mirrorings, strict=True)
        batch["moments"] = torch.stack([sample.image[int(mirrored)] for sample, mirrored in pairs])
