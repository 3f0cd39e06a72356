"""Networks: the autoencoder, the U-Net, and what they are made of; plain `nn.Module`s without a training loop."""

from ldm_train.nn.adaptation import PRESETS, Adaptation, ScaleMode, inject_adapters
from ldm_train.nn.adapted import AdaptedLayer, Adapter
from ldm_train.nn.adversarial import AdversarialLoss, AdversarialTerms, Clock
from ldm_train.nn.autoencoder import Autoencoder
from ldm_train.nn.autoencoder_loss import AutoencoderLoss, AutoencoderLossTerms
from ldm_train.nn.discriminator import HINGE, NON_SATURATING, AdversarialForm, GlobalBatchNorm2d, PatchDiscriminator
from ldm_train.nn.ema import ExponentialMovingAverage
from ldm_train.nn.first_stage import FirstStage, Pixels
from ldm_train.nn.lora import (
    adaptable_layers,
    adapted_layers,
    adapter_names,
    adapters_of,
    attach_adapters,
    bake_adapters,
    detach_adapters,
    lora_disabled,
    merge_adapters,
    set_multiplier,
    unmerge_adapters,
)
from ldm_train.nn.low_rank import LowRank
from ldm_train.nn.perceptual import LPIPS
from ldm_train.nn.regularizer import KLRegularizer, Regularized
from ldm_train.nn.unet import UNet
from ldm_train.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "HINGE",
    "LPIPS",
    "NON_SATURATING",
    "PRESETS",
    "Adaptation",
    "AdaptedLayer",
    "Adapter",
    "AdversarialForm",
    "AdversarialLoss",
    "AdversarialTerms",
    "Autoencoder",
    "AutoencoderLoss",
    "AutoencoderLossTerms",
    "Clock",
    "ExponentialMovingAverage",
    "FirstStage",
    "GlobalBatchNorm2d",
    "KLRegularizer",
    "LowRank",
    "PatchDiscriminator",
    "Pixels",
    "Regularized",
    "ScaleMode",
    "UNet",
    "VectorQuantizer",
    "adaptable_layers",
    "adapted_layers",
    "adapter_names",
    "adapters_of",
    "attach_adapters",
    "bake_adapters",
    "detach_adapters",
    "inject_adapters",
    "lora_disabled",
    "merge_adapters",
    "set_multiplier",
    "unmerge_adapters",
]
