"""Conditioners: what turns a batch into context tokens, vectors and maps for the network."""

from ldm_train.conditioning.conditioner import Conditioner, NoConditioner
from ldm_train.conditioning.text import TransformerTextConditioner

__all__ = ["Conditioner", "NoConditioner", "TransformerTextConditioner"]
