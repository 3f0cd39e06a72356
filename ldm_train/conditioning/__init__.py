"""Conditioners: what turns a batch into context tokens, vectors and maps for the network."""

from ldm_train.conditioning.clip import CLIPTextConditioner, CLIPTextEncoder
from ldm_train.conditioning.combined import CombinedConditioner
from ldm_train.conditioning.conditioner import Conditioner, NoConditioner
from ldm_train.conditioning.degraded_image import DegradedImageConditioner
from ldm_train.conditioning.label import LabelConditioner
from ldm_train.conditioning.mask import MaskConditioner
from ldm_train.conditioning.semantic_map import SemanticMapConditioner
from ldm_train.conditioning.size import SizeConditioner
from ldm_train.conditioning.text import TextConditioner, TransformerTextConditioner

__all__ = [
    "CLIPTextConditioner",
    "CLIPTextEncoder",
    "CombinedConditioner",
    "Conditioner",
    "DegradedImageConditioner",
    "LabelConditioner",
    "MaskConditioner",
    "NoConditioner",
    "SemanticMapConditioner",
    "SizeConditioner",
    "TextConditioner",
    "TransformerTextConditioner",
]
