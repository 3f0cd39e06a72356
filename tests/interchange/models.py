"""Small whole models: a U-Net with its average, an autoencoder and a text encoder, all random."""

import torch

from ldm_train.conditioning import CLIPTextEncoder
from ldm_train.interchange.model import Average, DiffusionModel, Part, TextEncoder

from .networks import SMALL, random_autoencoder
from .unets import SMALL_UNET, random_unet

SCHEDULE = {
    "_target_": "ldm_train.diffusion.scaled_linear_schedule",
    "num_steps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
TOWERS = {
    "openai": {"num_layers": 2, "num_heads": 3, "activation": "quick_gelu", "layer": "last"},
    "openclip": {"num_layers": 3, "num_heads": 3, "activation": "gelu", "layer": "penultimate"},
}
WIDTH = SMALL_UNET["context_dim"]


def encoder_of(text_encoder):
    """Our text encoder with its weights."""
    encoder = CLIPTextEncoder(WIDTH, **text_encoder.settings())
    kept = {name: text_encoder.tensors[name] for name in encoder.tower.state_dict()}
    encoder.tower.load_state_dict(kept, strict=True)
    return encoder


def random_text_encoder(kind="openai", *, whole=True):
    """A tower; `whole` with the last layer even where it is not used."""
    settings = TOWERS[kind]
    torch.manual_seed(3)
    encoder = CLIPTextEncoder(WIDTH, **settings | ({"layer": "last"} if whole else {}))
    tensors = {name: value + 0.02 * torch.randn(value.shape) for name, value in encoder.tower.state_dict().items()}
    return TextEncoder(tensors, **settings)


def random_model(unet=SMALL_UNET, autoencoder=SMALL, text="openai", prediction="epsilon", *, averaged=True):
    """Every part random; latents of one scale."""
    first_stage = random_autoencoder(autoencoder)
    channels = first_stage.latent_channels
    first_stage.calibrate(torch.zeros(channels), torch.full((channels,), 5.0))
    average = Average(random_unet(unet, seed=1).state_dict(), 7, 0.9999) if averaged else None
    return DiffusionModel(
        unet=Part(unet, random_unet(unet).state_dict()),
        average=average,
        autoencoder=Part(autoencoder, first_stage.state_dict()),
        text_encoder=None if text is None else random_text_encoder(text),
        schedule=SCHEDULE,
        prediction=prediction,
        ignored={},
    )
