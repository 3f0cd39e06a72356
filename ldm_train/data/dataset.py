"""What a worker does: a list of rows in, one batch out.

A sample that cannot be decoded must not shift the stream: leaving it out would change the batch, the positions after it
and, with several ranks, the number of steps. A substitute, the same on every attempt to train that step, takes its
place; the failure is counted and written down, and too many of them end the run.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_train.batch import ImageTextBatch
from ldm_train.data.buckets import next_alike
from ldm_train.data.captions import CaptionSource, PlainCaption, TextCaption, Texts
from ldm_train.data.crops import FLIP, Box, Crop, Margins, Shape, crop_of, margins, reduced, reduction
from ldm_train.data.index import CAPTION, IMAGE, METADATA, SEGMENTATION, ShardIndex
from ldm_train.data.labels import Label
from ldm_train.data.quarantine import Quarantine, TooManyBadSamplesError
from ldm_train.data.sampler import BatchRequest, substitute_rows
from ldm_train.data.segmentation import PixelClassifier, SegmentationMember
from ldm_train.data.shards import ShardReader
from ldm_train.data.storage import ShardReadError
from ldm_train.data.transforms import cut, decode_reduced, resize, resize_classes, to_signed_unit
from ldm_train.randomness import Stream, uniform, visit_id

_SUBSTITUTES = 16
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class ImageOptions:
    """How samples are made.

    Attributes:
        image_size: side of the square in pixels; with aspect buckets, of the square among their shapes.
        crop: which part of an image is shown: `center`, `random`, or a crop.
        flip: mirror half of the images left to right.
        interpolation: `bicubic` or `bilinear`.
        max_pixels: the largest image that is decoded.
        reducing_gap: g, the pixels of a JPEG that are kept for each of the shape, see `ldm_train.data.crops`; None
            decodes all of them.
        caption: where captions come from.
        label: what says the class of a sample; None: samples have none.
        segmentation: where segmentation maps come from; None: there are none.
    """

    image_size: int
    crop: str | Crop = "center"
    flip: bool = False
    interpolation: str = "bicubic"
    max_pixels: int = 1 << 26
    reducing_gap: float | None = None
    caption: CaptionSource = field(default_factory=TextCaption)
    label: Label | None = None
    segmentation: SegmentationMember | PixelClassifier | None = None

    def plain(self) -> "ImageOptions":
        """The same without augmentation, of all pixels, and with the first of several captions."""
        return replace(self, crop="center", flip=False, reducing_gap=None, caption=PlainCaption(self.caption))


class Sample(NamedTuple):
    """One sample as it is cached: what is the same in every epoch if nothing is cropped at random.

    Attributes:
        image: (3, h, w) uint8.
        texts: what captions are made of.
        label: its class, or None.
        segmentation: (h, w) int16 class of each pixel, or None.
        original_size: height and width of the upright image before anything was cut off.
        margins: what was cut off.
    """

    image: Tensor
    texts: Texts
    label: int | None
    segmentation: Tensor | None
    original_size: Shape
    margins: Margins


class Draws(NamedTuple):
    """The numbers that are drawn for a sample in an epoch, uniform on [0, 1).

    Attributes:
        augmentation: the place of the crop, the mirroring, and what else the crop asks for.
        caption: what the source of captions asks for.
    """

    augmentation: Sequence[float]
    caption: Sequence[float]


class ImageTextDataset(Dataset[ImageTextBatch]):
    """Batches of an index, made on request.

    Args:
        index: the samples.
        options: how images are made.
        seed: the run's seed, which with epoch and sample id keys every draw.
        quarantine: where failures go.
        cache: keeps decoded samples by sample id and shape when given; only for crops that draw nothing.
        shape_of: the shape in which a row is delivered, the same for all rows of a batch; None is the square.
    """

    def __init__(
        self,
        index: ShardIndex,
        options: ImageOptions,
        seed: int,
        quarantine: Quarantine,
        cache: dict[tuple[int, Shape], Sample] | None = None,
        shape_of: Callable[[int], Shape] | None = None,
    ) -> None:
        self.index, self.options, self.seed, self.quarantine, self.cache = index, options, seed, quarantine, cache
        self.shape_of, self.crop = shape_of, crop_of(options.crop)
        self.reader = ShardReader(index.paths, index.storage)
        self._augmentation_draws = max(self.crop.draws, FLIP + 1 if options.flip else 0)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, request: BatchRequest) -> ImageTextBatch:
        with self.quarantine.making(len(request.rows)):
            return self._batch(*request)

    def _batch(self, epoch: int, wanted: np.ndarray, positions: np.ndarray, visits: np.ndarray | int) -> ImageTextBatch:
        shape, visit = self._shape(wanted), np.broadcast_to(visits, len(wanted)).copy()
        maps = torch.empty(len(wanted), *shape, dtype=torch.int64)
        rows, samples, captions, corners, mirrorings = [], [], [], [], []
        for place, draws in enumerate(self._draws(epoch, wanted, visit)):
            asked = int(wanted[place]), visit[place : place + 1]
            row, sample, caption, mirrored = self._sample_or_substitute(epoch, *asked, draws, shape)
            if sample.segmentation is not None:
                maps[place] = sample.segmentation.flip(-1) if mirrored else sample.segmentation
            top, left, right = sample.margins
            corners.append((top, right if mirrored else left))
            rows.append(row)
            samples.append(sample)
            captions.append(caption)
            mirrorings.append(mirrored)
        batch = ImageTextBatch(
            caption=captions,
            sample_id=self._visit_id(rows, visit),
            position=torch.from_numpy(positions),
            epoch=epoch,
            key=[self.index.full_key(row) for row in rows],
            original_size=torch.tensor([sample.original_size for sample in samples]),
            crop=torch.tensor(corners),
        )
        self._put(batch, samples, mirrorings)
        if self.options.label is not None:
            batch["label"] = torch.tensor([sample.label for sample in samples])
        if self.options.segmentation is not None:
            batch["segmentation"] = maps
        return batch

    def _put(self, batch: ImageTextBatch, samples: Sequence[Sample], mirrorings: Sequence[bool]) -> None:
        """Put the images of samples into a batch, mirrored or not."""
        pairs = zip(samples, mirrorings, strict=True)
        batch["image"] = torch.stack([s.image.flip(-1) if mirrored else s.image for s, mirrored in pairs])

    def _shape(self, rows: np.ndarray) -> Shape:
        if self.shape_of is None:
            return Shape(self.options.image_size, self.options.image_size)
        shapes = {self.shape_of(int(row)) for row in rows}
        if len(shapes) > 1:
            raise ValueError(
                f"a batch of {len(rows)} images has the shapes {sorted(shapes)}; all images of a batch must be of one "
                "bucket; the order of the data and `data.buckets` must be made of the same index"
            )
        return shapes.pop()

    def _visit_id(self, rows: Sequence[int] | np.ndarray, visit: np.ndarray) -> Tensor:
        return visit_id(torch.from_numpy(np.asarray(self.index.sample_id[rows])), torch.from_numpy(visit))

    def _draws(self, epoch: int, rows: np.ndarray, visit: np.ndarray) -> Iterator[Draws]:
        # For all at once: the generator takes as long for one sample as for a hundred.
        sample_id = self._visit_id(rows, visit)
        augmentation = self._uniform(epoch, sample_id, Stream.AUGMENTATION, self._augmentation_draws)
        caption = self._uniform(epoch, sample_id, Stream.CAPTION, self.options.caption.draws)
        return map(Draws, augmentation, caption)

    def _uniform(self, epoch: int, sample_id: Tensor, stream: Stream, count: int) -> list[list[float]]:
        if count == 0:
            return [[]] * len(sample_id)
        return uniform(self.seed, epoch, sample_id, stream, (count,)).tolist()

    def _sample_or_substitute(
        self, epoch: int, row: int, visit: np.ndarray, draws: Draws, shape: Shape
    ) -> tuple[int, Sample, str, bool]:
        for candidate in self._candidates(epoch, row):
            try:
                if candidate != row:
                    (draws,) = self._draws(epoch, np.array([candidate]), visit)
                sample = self._sample(candidate, draws, shape)
                is_mirrored = self.options.flip and draws.augmentation[FLIP] < 0.5
                caption = self.options.caption(sample.texts, draws.caption)
                caption.encode("utf-8")  # JSON can hold halves of characters, on which tokenizers and loggers fail
                return candidate, sample, caption, is_mirrored
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
        drawn, shape_of = substitute_rows(_SUBSTITUTES, len(self), self.seed, epoch, sample_id), self.shape_of
        yield from drawn if shape_of is None else (next_alike(shape_of, row, start, len(self)) for start in drawn)

    def _sample(self, row: int, draws: Draws, shape: Shape) -> Sample:
        name = int(self.index.sample_id[row]), shape
        if self.cache is not None and name in self.cache:
            return self.cache[name]
        sample = self._make(row, draws, shape)
        if self.cache is not None:
            self.cache[name] = sample
        return sample

    def _make(self, row: int, draws: Draws, shape: Shape) -> Sample:
        data, options = self.index.read(self.reader, row, IMAGE), self.options
        box_of = partial(self.crop, shape=shape, draws=draws.augmentation)
        pixels, size, by = decode_reduced(
            data, lambda size: reduction(box_of(size), shape, options.reducing_gap), options.max_pixels
        )
        box = box_of(size)
        part = cut(pixels, reduced(box, by, Shape(*pixels.shape[-2:])))
        image = resize(part, shape, options.interpolation)
        texts, label = self._texts(row)
        return Sample(image, texts, label, self._map(row, size, box, image), size, margins(size, box, shape))

    def _texts(self, row: int) -> tuple[Texts, int | None]:
        """What captions are made of, and the label: both may need the metadata, which are read once."""
        label, kinds = self.options.label, self.options.caption.kinds
        caption = metadata = None
        if CAPTION in kinds:
            caption = self.index.read(self.reader, row, CAPTION).decode("utf-8")
        if METADATA in kinds or label is not None:
            metadata = self.index.metadata(self.reader, row)
        texts = Texts(caption, metadata if METADATA in kinds else None)
        return texts, None if label is None else label(metadata or {})

    def _map(self, row: int, size: Shape, box: Box, image: Tensor) -> Tensor | None:
        source, shape = self.options.segmentation, Shape(*image.shape[-2:])
        if not isinstance(source, SegmentationMember):
            return None if source is None else source(image)
        classes = source.decode(self.index.read(self.reader, row, SEGMENTATION), size.height, size.width)
        return resize_classes(cut(classes, box), shape)


def start_worker(worker_id: int) -> None:
    """Workers leave threads to their siblings, and signals to the main process, which must save before they go."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def as_is(batch: object) -> object:
    """What a loader collates: the data set makes whole batches."""
    return batch


def with_signed_image(batch: ImageTextBatch) -> ImageTextBatch:
    """A batch as a loader gives it, its image as float32 in [-1, 1]; one that is so already stays as it is."""
    if "image" not in batch or batch["image"].is_floating_point():
        return batch
    return batch | {"image": to_signed_unit(batch["image"])}
