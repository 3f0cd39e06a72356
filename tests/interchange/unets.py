"""U-Nets of every kind with weights that tell any two tensors apart, and inputs for them."""

import torch

from ldm_train.batch import Conditioning
from ldm_train.interchange import build_unet

SMALL_UNET = {
    "_target_": "ldm_train.nn.UNet",
    "in_channels": 4,
    "out_channels": 4,
    "channels": 32,
    "channel_multipliers": [1, 2, 4],
    "num_res_blocks": 1,
    "attention_factors": [1, 2],
    "context_dim": 24,
    "num_heads": 4,
    "norm_groups": 16,
}
PLAIN_UNET = {name: value for name, value in SMALL_UNET.items() if name not in ("context_dim", "num_heads")} | {
    "attention": "plain",
    "attention_factors": [2, 4],
    "head_channels": 16,
}
TRANSFORMER_KINDS = {
    "transformers": SMALL_UNET,
    "two blocks a level": SMALL_UNET | {"num_res_blocks": 2, "channel_multipliers": [1, 2, 2, 3]},
    "attention everywhere": SMALL_UNET | {"attention_factors": [1, 2, 4]},
    "attention in the middle alone": SMALL_UNET | {"attention_factors": []},
    "depths": SMALL_UNET | {"transformer_depth": [1, 2, 3], "attention_factors": [2, 4]},
    "width of a head": SMALL_UNET | {"num_heads": None, "head_channels": 8, "linear_projection": True},
    "vector": SMALL_UNET | {"vector_dim": 20},
    "concat": SMALL_UNET | {"concat_channels": 5},
    "learned variance": SMALL_UNET | {"out_channels": 8},
    "scale and shift": SMALL_UNET | {"time_modulation": "scale_shift"},
}
PLAIN_KINDS = {
    "plain": PLAIN_UNET,
    "plain, one level attends": PLAIN_UNET | {"attention_factors": [2], "num_res_blocks": 2, "concat_channels": 3},
    "plain, in the middle alone": PLAIN_UNET | {"attention_factors": [], "head_channels": None, "num_heads": 8},
    "plain, residual resampling": PLAIN_UNET | {"resample": "residual", "time_modulation": "scale_shift"},
}
# What the published layout can hold, and diffusers cannot.
PUBLISHED_KINDS = {
    "plain, a number of heads": PLAIN_UNET | {"head_channels": None, "num_heads": 8, "attention_factors": [1, 2, 4]},
    "plain, vector": PLAIN_UNET | {"vector_dim": 20},
    "transformers, residual resampling": SMALL_UNET | {"resample": "residual"},
}
# The published U-Nets of Stable Diffusion.
SD1 = {"_target_": "ldm_train.nn.UNet", "in_channels": 4, "out_channels": 4, "context_dim": 768, "num_heads": 8}
SD2 = {
    "_target_": "ldm_train.nn.UNet",
    "in_channels": 4,
    "out_channels": 4,
    "context_dim": 1024,
    "head_channels": 64,
    "linear_projection": True,
}
DIFFUSERS_KINDS = TRANSFORMER_KINDS | PLAIN_KINDS
ALL_KINDS = DIFFUSERS_KINDS | PUBLISHED_KINDS


def random_unet(node, seed=0):
    """Every tensor is drawn, the zero ones included, so that no two can be exchanged unnoticed."""
    with torch.device("meta"):  # no time is lost on weights that are drawn again
        unet = build_unet(node).eval()
    unet.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + (parameter.ndim == 1))
    return unet


def inputs(node, size=8, batch=2, tokens=5):
    """Noisy latents, times and a condition for a U-Net."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator)

    context, vector, concat = (node.get(key) for key in ("context_dim", "vector_dim", "concat_channels"))
    conditioning = Conditioning(
        context=None if context is None else draw(tokens, context),
        vector=None if vector is None else draw(vector),
        concat=draw(concat, size, size) if concat else None,
    )
    return draw(node["in_channels"], size, size), torch.tensor([3, 700])[:batch], conditioning
