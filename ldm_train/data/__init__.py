"""Captioned images from WebDataset shards: index, order, decoding, labels, segmentation maps, loading."""

from ldm_train.data.bucketed_order import BucketedOrder
from ldm_train.data.buckets import AspectBuckets, ShapeOfRow, assign, bucket_shapes
from ldm_train.data.captions import (
    CaptionSource,
    FieldCaption,
    PlainCaption,
    ShuffledTags,
    TextCaption,
    TextLines,
    Texts,
    WeightedCaptions,
)
from ldm_train.data.crops import Box, CenterCrop, Crop, RandomCrop, RandomResizedCrop, Shape
from ldm_train.data.datamodule import ImageTextDataModule
from ldm_train.data.dataset import ImageOptions, ImageTextDataset
from ldm_train.data.filters import (
    AspectRatio,
    CaptionLength,
    FieldIn,
    FieldNotIn,
    Filter,
    Maximum,
    Minimum,
    MinimumSize,
)
from ldm_train.data.folders import FolderShards, folders_of
from ldm_train.data.index import Damage, ShardIndex, build_index
from ldm_train.data.labels import FieldLabel, Label
from ldm_train.data.latents import LatentCache, LatentTextDataset
from ldm_train.data.locations import expand_shards
from ldm_train.data.mixed_order import MixedOrder
from ldm_train.data.order import Order, ShuffledOrder
from ldm_train.data.quarantine import Quarantine, TooManyBadSamplesError
from ldm_train.data.remote import RemoteFiles
from ldm_train.data.sampler import BatchRequest, Position, TrainingSampler, ValidationSampler
from ldm_train.data.segmentation import ColourRegions, PixelClassifier, SegmentationMember
from ldm_train.data.shard_cache import ShardCache
from ldm_train.data.shards import ShardReader, scan_shard
from ldm_train.data.storage import LocalFiles, Routed, ShardReadError, Storage
from ldm_train.data.subject import subject_mixture

__all__ = [
    "AspectBuckets",
    "AspectRatio",
    "BatchRequest",
    "Box",
    "BucketedOrder",
    "CaptionLength",
    "CaptionSource",
    "CenterCrop",
    "ColourRegions",
    "Crop",
    "Damage",
    "FieldCaption",
    "FieldIn",
    "FieldLabel",
    "FieldNotIn",
    "Filter",
    "FolderShards",
    "ImageOptions",
    "ImageTextDataModule",
    "ImageTextDataset",
    "Label",
    "LatentCache",
    "LatentTextDataset",
    "LocalFiles",
    "Maximum",
    "Minimum",
    "MinimumSize",
    "MixedOrder",
    "Order",
    "PixelClassifier",
    "PlainCaption",
    "Position",
    "Quarantine",
    "RandomCrop",
    "RandomResizedCrop",
    "RemoteFiles",
    "Routed",
    "SegmentationMember",
    "Shape",
    "ShapeOfRow",
    "ShardCache",
    "ShardIndex",
    "ShardReadError",
    "ShardReader",
    "ShuffledOrder",
    "ShuffledTags",
    "Storage",
    "TextCaption",
    "TextLines",
    "Texts",
    "TooManyBadSamplesError",
    "TrainingSampler",
    "ValidationSampler",
    "WeightedCaptions",
    "assign",
    "bucket_shapes",
    "build_index",
    "expand_shards",
    "folders_of",
    "scan_shard",
    "subject_mixture",
]
