"""Captioned images from WebDataset shards: index, order, decoding, labels, segmentation maps, loading."""

from ldm_train.data.datamodule import ImageTextDataModule
from ldm_train.data.dataset import ImageOptions, ImageTextDataset, Quarantine, TooManyBadSamplesError
from ldm_train.data.filters import FieldIn, FieldNotIn, Filter, MinimumSize
from ldm_train.data.index import Damage, ShardIndex, build_index
from ldm_train.data.labels import FieldLabel, Label
from ldm_train.data.locations import expand_shards
from ldm_train.data.remote import RemoteFiles
from ldm_train.data.sampler import BatchRequest, Position, ShuffledOrder, TrainingSampler, ValidationSampler
from ldm_train.data.segmentation import ColourRegions, PixelClassifier, SegmentationMember
from ldm_train.data.shard_cache import ShardCache
from ldm_train.data.shards import ShardReader, scan_shard
from ldm_train.data.storage import LocalFiles, Routed, ShardReadError, Storage

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
    "LocalFiles",
    "MinimumSize",
    "PixelClassifier",
    "Position",
    "Quarantine",
    "RemoteFiles",
    "Routed",
    "SegmentationMember",
    "ShardCache",
    "ShardIndex",
    "ShardReadError",
    "ShardReader",
    "ShuffledOrder",
    "Storage",
    "TooManyBadSamplesError",
    "TrainingSampler",
    "ValidationSampler",
    "build_index",
    "expand_shards",
    "scan_shard",
]
