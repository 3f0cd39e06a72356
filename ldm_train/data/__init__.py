"""Captioned images from WebDataset shards: index, order, decoding, labels, segmentation maps, loading."""

from ldm_train.data.datamodule import ImageTextDataModule
from ldm_train.data.dataset import ImageOptions, ImageTextDataset, Quarantine, TooManyBadSamplesError
from ldm_train.data.filters import FieldIn, FieldNotIn, Filter, MinimumSize
from ldm_train.data.index import Damage, ShardIndex, build_index, expand_shards
from ldm_train.data.labels import FieldLabel, Label
from ldm_train.data.latents import LatentCache, LatentTextDataset
from ldm_train.data.sampler import BatchRequest, Position, ShuffledOrder, TrainingSampler, ValidationSampler
from ldm_train.data.segmentation import ColourRegions, PixelClassifier, SegmentationMember
from ldm_train.data.shards import ShardReader, ShardReadError, scan_shard

__all__ = [
    "BatchRequest",
    "ColourRegions",
    "Damage",
    "FieldIn",
    "FieldLabel",
    "FieldNotIn",
    "Filter",
    "ImageOptions",
    "ImageTextDataModule",
    "ImageTextDataset",
    "Label",
    "LatentCache",
    "LatentTextDataset",
    "MinimumSize",
    "PixelClassifier",
    "Position",
    "Quarantine",
    "SegmentationMember",
    "ShardIndex",
    "ShardReadError",
    "ShardReader",
    "ShuffledOrder",
    "TooManyBadSamplesError",
    "TrainingSampler",
    "ValidationSampler",
    "build_index",
    "expand_shards",
    "scan_shard",
]
