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

What a `.latent` member holds: `ldm_train.data.latent_member`. With aspect buckets each image was encoded in the shape
of its bucket (`ldm_train.data.buckets`); a run with the same buckets forms the same batches, for the members name the
sizes of their images. Segmentation maps lie beside the latents as they were, and are cut by the box that is kept.

What equals what: with float32 arithmetic and storage a run on the cache has the losses of a run on the images but for
rounding, 1e-5 of each at first, which training then amplifies. With `trainer.precision=bf16-mixed` the encoder of a run
on images computes in bfloat16: a cache of --precision bfloat16 holds the same moments, in --dtype float16 too, which is
wider; one of --precision float32 holds better ones, and the losses agree to some thousandths only.

Letters: V versions, C latent channels, k moments per channel, h and w size of the latents.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch, LatentFacts
from ldm_train.data.crops import Shape, covering_box, crop_of, margins
from ldm_train.data.dataset import Draws, ImageOptions, ImageTextDataset, Sample
from ldm_train.data.index import IMAGE, SEGMENTATION, ShardIndex, build_index
from ldm_train.data.latent_member import TOOL, Cached, unpack
from ldm_train.data.latent_settings import LatentSettings, sizes_of
from ldm_train.data.locations import expand_shards, folders_above, in_folder, is_url, relative_to, shown
from ldm_train.data.segmentation import SegmentationMember
from ldm_train.data.storage import LOCAL_FILES, ShardReadError, Storage
from ldm_train.data.transforms import cut, resize_classes

MANIFEST = "manifest.json"
VERSION = 1

# A bicubic resize of bytes ends in bytes: no value lies outside by more than rounding.
_TOLERANCE = 1e-3
_COMPARED = 256  # keys that must agree where images and their latents are taken for the same samples


@dataclass(frozen=True)
class Manifest:
    """A cache as a whole.

    Attributes:
        folder: where it lies, a path or a URL.
        settings: what its values depend on.
        image_range: least and largest value of the images as they were encoded.
        source_root: the folder that holds all source shards, a path or a URL.
        shards: name of each shard, relative to the folder -> its bytes.
    """

    folder: str
    settings: LatentSettings
    image_range: tuple[float, float]
    source_root: str
    shards: Mapping[str, int]


def read_manifest(folder: str, storage: Storage = LOCAL_FILES, query_of: str = "") -> Manifest:
    """Read a cache's manifest.

    Args:
        folder: where the cache lies.
        storage: what opens it.
        query_of: a URL whose query opens it too.

    Raises:
        FileNotFoundError: if there is none on this disk.
        ShardReadError: if none can be fetched.
        ValueError: if it is of another version, or damaged.
    """
    with os.fdopen(storage.open(in_folder(folder, MANIFEST, query_of)), "rb") as file:
        data = file.read()
    try:
        content = json.loads(data)
        if content["version"] != VERSION:
            raise ValueError(f"it has version {content['version']}, this program reads {VERSION}")
        images, shards = content["images"], {shard["name"]: shard["size"] for shard in content["shards"]}
        settings, source = LatentSettings.read(content["settings"]), content["source"]["root"]
        return Manifest(folder, settings, (images["min"], images["max"]), source, shards)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{shown(folder)}/{MANIFEST} is no manifest of cached latents ({error}); allowed is what the tool writes; "
            f"make the cache anew by {TOOL} --overwrite, or change `data.shards`"
        ) from error


def manifests_of(locations: Sequence[str], storage: Storage = LOCAL_FILES) -> dict[str, Manifest]:
    """Location of a shard -> manifest of its cache, in the shard's folder or the nearest one above it that has one.

    Raises:
        ValueError: if there is none, or it says nothing of the shard.
    """
    of_folder: dict[str, Manifest] = {}
    found: dict[str, Manifest] = {}
    for location in locations:
        folder = folders_above(location)[0]
        if folder not in of_folder:
            of_folder[folder] = _manifest_above(location, storage)
        manifest = found[location] = of_folder[folder]
        if relative_to(location, manifest.folder) not in manifest.shards:
            raise ValueError(
                f"{shown(location)} is there, its cache's {MANIFEST} says nothing of it; allowed are shards of the "
                "cache, not what an earlier one left beside them; remove it, or change `data.shards`"
            )
    return found


def check_sizes(indices: Sequence[ShardIndex]) -> None:
    """Refuse, with ValueError, shards that were changed since their cache was made."""
    for index in indices:
        for location, size, manifest in zip(index.paths, index.file_sizes, _manifests(index).values(), strict=True):
            told = manifest.shards[relative_to(location, manifest.folder)]
            if told != size:
                raise ValueError(
                    f"{shown(location)} has {size} bytes, its cache's {MANIFEST} says {told}; allowed are shards as "
                    "the tool left them; run it again with --overwrite, or change `data.shards`"
                )


def _manifest_above(location: str, storage: Storage) -> Manifest:
    failures = []
    for folder in folders_above(location):
        try:
            return read_manifest(folder, storage, location)
        except (FileNotFoundError, NotADirectoryError, ShardReadError) as error:
            failures.append(f" ({error})" if is_url(location) else "")
    raise ValueError(
        f"there is no {MANIFEST} in {shown(folders_above(location)[0])}{failures[0]}; allowed are the shards of a "
        "finished cache; change `data.shards`, finish the cache by the tool's --merge, copy its manifest beside the "
        f"shards, or make one: {TOOL}"
    )


class LatentCache:
    """Says that `data.shards` are cached latents, which batches then hold as `moments` instead of an `image`.

    Args:
        reference_shards: the images themselves, for what compares with real ones (samples, Frechet distances); None
            takes those the cache was made of.
    """

    def __init__(self, reference_shards: str | Sequence[str] | None = None) -> None:
        self.reference_shards = reference_shards

    def facts(
        self,
        locations: Sequence[str],
        options: ImageOptions,
        shapes: Sequence[Shape] | None = None,
        storage: Storage = LOCAL_FILES,
    ) -> LatentFacts:
        """What a stage has to know of the cache, or the caches of one kind, that shards belong to.

        Args:
            locations: the shards.
            options: how the run wants its images.
            shapes: those of the run's aspect buckets; None: it wants squares.
            storage: where the shards lie.

        Raises:
            ValueError: if a cache was not made like that, or of images that were not in [-1, 1], or if two differ.
        """
        caches = {manifest.folder: manifest for manifest in manifests_of(locations, storage).values()}
        first, *others = [self._facts(manifest, options, shapes) for manifest in caches.values()]
        for other in others:
            if other[1:] != first[1:]:
                raise ValueError(
                    f"{first.folder} and {other.folder} hold latents of different encoders ({first.encoder[:12]} and "
                    f"{other.encoder[:12]}); allowed is one; change `data.shards`, `data.val_shards` or `data.mixture`"
                )
        return first

    def _facts(self, manifest: Manifest, options: ImageOptions, shapes: Sequence[Shape] | None) -> LatentFacts:
        settings, (low, high) = manifest.settings, manifest.image_range
        if low < -1.0 - _TOLERANCE or high > 1.0 + _TOLERANCE:
            raise ValueError(
                f"the images of {shown(manifest.folder)} had values from {low:g} to {high:g} when they were encoded; "
                f"allowed is [-1, 1], which the autoencoder was trained on; make the cache anew: {TOOL} --overwrite"
            )
        if options.segmentation is not None:
            maps, found = options.segmentation, f"a {type(options.segmentation).__name__}"
            is_member = isinstance(maps, SegmentationMember)
            _check(is_member, "segmentation", found, "null, or maps that are members: latents have no pixels")
            extension, kept = maps.extension if isinstance(maps, SegmentationMember) else None, settings.segmentation
            _check(extension == kept, "segmentation.extension", extension, kept or "none: made without --segmentation")
        _check(options.image_size == settings.image_size, "image_size", options.image_size, settings.image_size)
        crop = crop_of(options.crop)
        _check(type(crop) is type(crop_of(settings.crop)), "crop", type(crop).__name__, settings.crop)
        _check(settings.flip or not options.flip, "flip", options.flip, "false: the cache was made without --flip")
        interpolation = options.interpolation
        _check(interpolation == settings.interpolation, "interpolation", interpolation, settings.interpolation)
        _check(options.reducing_gap is None, "reducing_gap", options.reducing_gap, "null: all pixels were encoded")
        _check(options.max_pixels == settings.max_pixels, "max_pixels", options.max_pixels, settings.max_pixels)
        sizes = sizes_of(shapes or [Shape(options.image_size, options.image_size)])
        wanted = f"{'null' if shapes is None else 'set'}, which asks for the shapes {sizes},"
        _check(sizes == sizes_of(settings.all_shapes), "buckets", wanted, sizes_of(settings.all_shapes))
        return LatentFacts(
            shown(manifest.folder),
            settings.encoder,
            settings.factor,
            settings.latent_channels,
            settings.moments_per_channel,
        )

    def images_of(
        self,
        cached: ShardIndex,
        required: Sequence[int],
        segmentation: str | None = None,
        list_remote: Callable[[str], list[str]] | None = None,
    ) -> ShardIndex:
        """The images of the rows of a cache.

        Args:
            cached: the rows.
            required: the kinds of members without which a sample is incomplete, as in the cache.
            segmentation: the extension of segmentation maps, as in the cache.
            list_remote: the URLs that a glob matches.

        Raises:
            FileNotFoundError: see `reference_paths`.
            ShardReadError: if they cannot be read, as where a store asks for a signature.
            ValueError: if they are not the same samples.
        """
        paths = self.reference_paths(cached, list_remote)
        try:
            images = build_index(paths, required, segmentation, storage=cached.storage)
        except ShardReadError as error:
            if self.reference_shards is not None:
                raise
            raise ShardReadError(
                f"real images are asked for, and those that the cache was made of cannot be read: {error} A manifest "
                "keeps no signature, password or key: set `data.latents.reference_shards` to the same shards with it."
            ) from error
        return image_rows(cached, images)

    def reference_paths(
        self, cached: ShardIndex, list_remote: Callable[[str], list[str]] | None = None
    ) -> tuple[str, ...]:
        """The shards with the images that cached ones were made of, in the same order.

        Raises:
            FileNotFoundError: if they are not there any more, and no others are named.
        """
        if self.reference_shards is not None:
            return expand_shards(self.reference_shards, "data.latents.reference_shards", list_remote)
        sources = tuple(
            in_folder(manifest.source_root, relative_to(path, manifest.folder))
            for path, manifest in _manifests(cached).items()
        )
        missing = [path for path in sources if not is_url(path) and not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(
                f"real images are asked for, and {missing[0]}, which the cache was made of, "
                "is not there; allowed are the same shards elsewhere; set `data.latents.reference_shards` to them, or "
                "do without by `callbacks.samples=null`"
            )
        return sources


def _manifests(index: ShardIndex) -> dict[str, Manifest]:
    return manifests_of(index.paths, index.storage)


def _check(is_allowed: bool, key: str, found: object, allowed: object) -> None:
    if not is_allowed:
        raise ValueError(
            f"`data.{key}` is {found} with cached latents; allowed is {allowed}, as the cache was made; change "
            f"`data.{key}`, or make another cache: {TOOL}"
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
        if cached.box != covering_box(cached.source_size, shape):
            raise ValueError(
                f"latents of {cached.box}, cut out of {cached.source_size}, where {shape} is wanted; allowed is the "
                "shape of the bucket that the image is in; keep the .parquet beside each shard of the cache, or make "
                f"it anew: {TOOL} --buckets STEP"
            )
        cut_off = margins(cached.source_size, cached.box, shape)
        return Sample(cached.moments, *self._texts(row), self._classes(row, cached, shape), cached.source_size, cut_off)

    def _classes(self, row: int, cached: Cached, shape: Shape) -> Tensor | None:
        """The map as it was before, cut and resized like the image."""
        source = self.options.segmentation
        if not isinstance(source, SegmentationMember):
            return None
        classes = source.decode(self.index.read(self.reader, row, SEGMENTATION), *cached.source_size)
        return resize_classes(cut(classes, cached.box), shape)

    def _put(self, batch: ImageTextBatch, samples: Sequence[Sample], mirrorings: Sequence[bool]) -> None:
        pairs = zip(samples, mirrorings, strict=True)
        batch["moments"] = torch.stack([sample.image[int(mirrored)] for sample, mirrored in pairs])
