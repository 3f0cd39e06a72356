"""What torchmetrics lacks: feature extractors that name themselves, statistics on disk, latents, caption retrieval."""

from ldm_train.metrics.features import (
    FeatureExtractor,
    InceptionFeatures,
    RandomConvFeatures,
    feature_extractor,
    fid_key,
)
from ldm_train.metrics.frechet import (
    FrechetDistance,
    GaussianStatistics,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from ldm_train.metrics.images import to_uint8
from ldm_train.metrics.latents import CodebookSummary, CodebookUsage, LatentStatistics, LatentSummary
from ldm_train.metrics.retrieval import CaptionRetrieval, retrieval_at_1

__all__ = [
    "CaptionRetrieval",
    "CodebookSummary",
    "CodebookUsage",
    "FeatureExtractor",
    "FrechetDistance",
    "GaussianStatistics",
    "InceptionFeatures",
    "LatentStatistics",
    "LatentSummary",
    "RandomConvFeatures",
    "feature_extractor",
    "fid_key",
    "frechet_distance",
    "load_statistics",
    "retrieval_at_1",
    "save_statistics",
    "to_uint8",
]
