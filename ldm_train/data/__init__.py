"""Captioned images from WebDataset shards: index, order, decoding, loading."""

from ldm_train.data.datamodule import ImageTextDataModule
from ldm_train.data.dataset import ImageOptions, ImageTextDataset, Quarantine, TooManyBadSamplesError
from ldm_train.data.filters import FieldIn, FieldNotIn, Filter, MinimumSize
from ldm_train.data.index import Damage, ShardIndex, build_index, expand_shards
from ldm_train.data.sampler import BatchRequest, Position, ShuffledOrder, TrainingSampler, ValidationSampler
from ldm_train.data.shards import ShardReader, ShardReadError, scan_shard

__all__ = [
    "BatchRequest",
    "Damage",
    "FieldIn",
    "FieldNotIn",
    "Filter",
    "ImageOptions",
    "ImageTextDataModule",
    "ImageTextDataset",
    "MinimumSize",
    "Position",
    "Quarantine",
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
