"""What a worker does: a list of rows in, one batch out.

A sample that cannot be decoded must not shift the stream: leaving it out would change the batch, the positions after it
and, with several ranks, the number of steps. A substitute, the same on every attempt to train that step, takes its
place; the failure is counted and written down, and too many of them end the run.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm_train.batch import ImageTextBatch
from ldm_train.data.index import CAPTION, IMAGE, SEGMENTATION, ShardIndex
from ldm_train.data.labels import Label
from ldm_train.data.sampler import BatchRequest, substitute_rows
from ldm_train.data.segmentation import PixelClassifier, SegmentationMember
from ldm_train.data.shards import ShardReader, ShardReadError
from ldm_train.data.transforms import crop_square, decode_rgb, flip_where, resize, resize_classes, to_signed_unit
from ldm_train.randomness import Stream, uniform

_SUBSTITUTES = 16
_FORGIVEN = 10
CROPS = ("center", "random")
INTERPOLATIONS = ("bicubic", "bilinear")


class TooManyBadSamplesError(RuntimeError):
    """More samples could not be decoded than `data.max_bad_fraction` allows."""


class Quarantine:
    """Counts the samples that could not be decoded, names each once in a file, and ends the run above a share.

    Args:
        path: file to append JSON lines to, one file per process: `-worker<n>.jsonl` is added; None writes nothing.
        max_bad_fraction: the share of failures at which to stop; the first ten are forgiven.
        num_workers: worker processes, each of which counts for itself in memory that all can read.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float, num_workers: int) -> None:
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.counts = torch.zeros(max(1, num_workers), 2, dtype=torch.int64)
        if num_workers:
            self.counts.share_memory_()
        self._named: set[int] = set()

    @property
    def seen(self) -> int:
        """Samples asked for so far, in all workers."""
        return int(self.counts[:, 0].sum())

    @property
    def bad(self) -> int:
        """Samples among them that could not be decoded."""
        return int(self.counts[:, 1].sum())

    def passed(self, samples: int) -> None:
        """Count samples that were asked for."""
        self.counts[self._worker(), 0] += samples

    def failed(self, sample_id: int, key: str, error: Exception) -> None:
        """Count and write down a sample that could not be decoded."""
        self.counts[self._worker(), 1] += 1
        reason = f"{type(error).__name__}: {error}"
        if self.path is not None and sample_id not in self._named:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{self.path}-worker{self._worker()}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "sample_id": sample_id, "error": reason}) + "\n")
        self._named.add(sample_id)
        if self.bad > max(_FORGIVEN, self.max_bad_fraction * self.seen):
            raise TooManyBadSamplesError(
                f"{self.bad} of {self.seen} samples could not be decoded, the last being {key} ({reason}). At most "
                f"{self.max_bad_fraction:.2%} may fail: mend or leave out the samples listed in `data.quarantine_dir`, "
                "or raise `data.max_bad_fraction`."
            )

    @staticmethod
    def _worker() -> int:
        info = get_worker_info()
        return 0 if info is None else info.id


@dataclass(frozen=True)
class ImageOptions:
    """How samples are made.

    Attributes:
        image_size: side of the square in pixels.
        crop: where the square is cut along the longer side: `center`, or `random`.
        flip: mirror half of the images left to right.
        interpolation: `bicubic` or `bilinear`.
        max_pixels: the largest image that is decoded.
        caption_field: metadata field that holds the caption; None takes the `.txt`.
        label: what says the class of a sample; None: samples have none.
        segmentation: where segmentation maps come from; None: there are none.
    """

    image_size: int
    crop: str = "center"
    flip: bool = False
    interpolation: str = "bicubic"
    max_pixels: int = 1 << 26
    caption_field: str | None = None
    label: Label | None = None
    segmentation: SegmentationMember | PixelClassifier | None = None

    def plain(self) -> "ImageOptions":
        """The same without augmentation."""
        return replace(self, crop="center", flip=False)


class Sample(NamedTuple):
    """One sample as it is cached: what is the same in every epoch if nothing is cropped at random.

    Attributes:
        image: (3, H, W) uint8.
        caption: the text.
        label: its class, or None.
        segmentation: (H, W) int16 class of each pixel, or None.
    """

    image: Tensor
    caption: str
    label: int | None
    segmentation: Tensor | None


class ImageTextDataset(Dataset[ImageTextBatch]):
    """Batches of an index, made on request.

    Args:
        index: the samples.
        options: how images are made.
        seed: the run's seed, which with epoch and sample id keys the augmentation.
        quarantine: where failures go.
        cache: keeps decoded samples by sample id when given; only with `crop=center`.
    """

    def __init__(
        self,
        index: ShardIndex,
        options: ImageOptions,
        seed: int,
        quarantine: Quarantine,
        cache: dict[int, Sample] | None = None,
    ) -> None:
        self.index, self.options, self.seed, self.quarantine, self.cache = index, options, seed, quarantine, cache
        self.reader = ShardReader(index.paths)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, request: BatchRequest) -> ImageTextBatch:
        epoch, wanted, positions = request
        self.quarantine.passed(len(wanted))
        rows, samples = zip(*(self._sample_or_substitute(epoch, int(row)) for row in wanted), strict=True)
        sample_id = torch.from_numpy(self.index.sample_id[list(rows)])
        flip = self._draws(epoch, sample_id)[:, 1] < 0.5 if self.options.flip else None
        batch = ImageTextBatch(
            caption=[sample.caption for sample in samples],
            sample_id=sample_id,
            position=torch.from_numpy(positions),
            epoch=epoch,
            key=[self.index.full_key(row) for row in rows],
        )
        self._put(batch, samples, flip)
        if self.options.label is not None:
            batch["label"] = torch.tensor([sample.label for sample in samples])
        if self.options.segmentation is not None:
            maps = torch.stack([sample.segmentation for sample in samples]).long()
            batch["segmentation"] = maps if flip is None else flip_where(maps, flip)
        return batch

    def _put(self, batch: ImageTextBatch, samples: Sequence[Sample], flip: Tensor | None) -> None:
        """Add what was made of the images, mirrored where `flip` (B,) is true."""
        images = torch.stack([sample.image for sample in samples])
        batch["image"] = to_signed_unit(images if flip is None else flip_where(images, flip))

    def _draws(self, epoch: int, sample_id: Tensor) -> Tensor:
        """(B, 2) uniform numbers: the place of the crop and the flip."""
        return uniform(self.seed, epoch, sample_id, Stream.AUGMENTATION, (2,))

    def _sample_or_substitute(self, epoch: int, row: int) -> tuple[int, Sample]:
        for candidate in self._candidates(epoch, row):
            try:
                return candidate, self._sample(epoch, candidate)
            except ShardReadError:
                raise
            except Exception as error:  # whatever a decoder throws at damaged bytes: counted, named and limited
                self.quarantine.failed(int(self.index.sample_id[candidate]), self.index.full_key(candidate), error)
        raise TooManyBadSamplesError(
            f"{self.index.full_key(row)} and {_SUBSTITUTES} substitutes could not be decoded. Nearly every image must "
            "be readable: look at the files listed in `data.quarantine_dir`, then choose other `data.shards`."
        )

    def _candidates(self, epoch: int, row: int) -> Iterator[int]:
        yield row
        sample_id = int(self.index.sample_id[row])
        yield from substitute_rows(_SUBSTITUTES, len(self.index), self.seed, epoch, sample_id)

    def _sample(self, epoch: int, row: int) -> Sample:
        sample_id = int(self.index.sample_id[row])
        if self.cache is not None and sample_id in self.cache:
            return self.cache[sample_id]
        sample = self._make(epoch, row)
        if self.cache is not None:
            self.cache[sample_id] = sample
        return sample

    def _make(self, epoch: int, row: int) -> Sample:
        sample_id = int(self.index.sample_id[row])
        image = decode_rgb(self.index.read(self.reader, row, IMAGE), self.options.max_pixels)
        is_random = self.options.crop == "random"
        place = self._draws(epoch, torch.tensor([sample_id]))[0, 0].item() if is_random else 0.5
        square = resize(crop_square(image, place), self.options.image_size, self.options.interpolation)
        return Sample(square, self._caption(row), self._label(row), self._segmentation(row, image, square, place))

    def _label(self, row: int) -> int | None:
        label = self.options.label
        return None if label is None else label(self.index.metadata(self.reader, row))

    def _segmentation(self, row: int, image: Tensor, square: Tensor, place: float) -> Tensor | None:
        source = self.options.segmentation
        if not isinstance(source, SegmentationMember):
            return None if source is None else source(square)
        height, width = image.shape[-2:]
        classes = source.decode(self.index.read(self.reader, row, SEGMENTATION), height, width)
        return resize_classes(crop_square(classes, place), self.options.image_size)

    def _caption(self, row: int) -> str:
        field = self.options.caption_field
        if field is None:
            return self.index.read(self.reader, row, CAPTION).decode("utf-8").strip()
        caption = self.index.metadata(self.reader, row)[field]
        if not isinstance(caption, str):
            raise TypeError(f"metadata field {field!r} is {caption!r}, not a text")
        return caption.strip()
