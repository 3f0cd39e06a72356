"""Networks: the autoencoder, the U-Net, and what they are made of; plain `nn.Module`s without a training loop."""

from ldm_train.nn.autoencoder import Autoencoder
from ldm_train.nn.autoencoder_loss import AutoencoderLoss, AutoencoderLossTerms
from ldm_train.nn.ema import ExponentialMovingAverage
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
from ldm_train.nn.regularizer import KLRegularizer, Regularized
from ldm_train.nn.unet import UNet

__all__ = [
    "Autoencoder",
    "AutoencoderLoss",
    "AutoencoderLossTerms",
    "ExponentialMovingAverage",
    "KLRegularizer",
    "LoRALinear",
    "Regularized",
    "UNet",
    "inject_lora",
    "load_lora_state_dict",
    "lora_disabled",
    "lora_layers",
    "lora_shape",
    "lora_state_dict",
    "merge_lora",
]
