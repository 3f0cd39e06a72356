"""Networks: the autoencoder, the U-Net, and what they are made of; plain `nn.Module`s without a training loop."""

from ldm_train.nn.adversarial import AdversarialLoss, AdversarialTerms, Clock
from ldm_train.nn.autoencoder import Autoencoder
from ldm_train.nn.autoencoder_loss import AutoencoderLoss, AutoencoderLossTerms
from ldm_train.nn.discriminator import HINGE, NON_SATURATING, AdversarialForm, GlobalBatchNorm2d, PatchDiscriminator
from ldm_train.nn.ema import ExponentialMovingAverage
from ldm_train.nn.first_stage import FirstStage, Pixels
from ldm_train.nn.lora import (
    LoRALinear,
    inject_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_layers,
    lora_shape,
    lora_state_dict,
    merge_lora,
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
    "LoRALinear",
    "LowRank",
    "PatchDiscriminator",
    "Pixels",
    "Regularized",
    "UNet",
    "VectorQuantizer",
    "inject_lora",
    "load_lora_state_dict",
    "lora_disabled",
    "lora_layers",
    "lora_shape",
    "lora_state_dict",
    "merge_lora",
]
