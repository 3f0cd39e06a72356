"""The three stages, each a LightningModule: the autoencoder, the latent diffusion model, LoRA fine-tuning."""

from ldm_train.stages.autoencoder import AutoencoderStage
from ldm_train.stages.class_images import make_class_images
from ldm_train.stages.latent_diffusion import LatentDiffusion, Original
from ldm_train.stages.lora import LoRAFineTuning, text_shape
from ldm_train.stages.moments import CachedMoments, EncodedMoments, RememberedMoments
from ldm_train.stages.optimization import warmup_constant, warmup_cosine
from ldm_train.stages.prompts import refuse_if_cut
from ldm_train.stages.text_encoder import load_text_encoder

__all__ = [
    "AutoencoderStage",
    "CachedMoments",
    "EncodedMoments",
    "LatentDiffusion",
    "LoRAFineTuning",
    "Original",
    "RememberedMoments",
    "load_text_encoder",
    "make_class_images",
    "refuse_if_cut",
    "text_shape",
    "warmup_constant",
    "warmup_cosine",
]
