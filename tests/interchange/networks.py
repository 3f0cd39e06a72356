"""Autoencoders of every kind with weights that tell any two tensors apart."""

import torch

from ldm_train.interchange import build

SMALL = {
    "_target_": "ldm_train.nn.Autoencoder",
    "regularizer": {"_target_": "ldm_train.nn.KLRegularizer"},
    "latent_channels": 4,
    "channels": 16,
    "channel_multipliers": [1, 2, 2],
    "num_res_blocks": 1,
    "norm_groups": 8,
}
CODEBOOK = {"_target_": "ldm_train.nn.VectorQuantizer", "codebook_size": 32, "latent_channels": 4}
KINDS = {
    "plain": SMALL,
    "attention in levels": SMALL | {"attention_factors": [2, 4], "num_res_blocks": 2},
    "no attention": SMALL | {"middle_attention": False},
    "other multipliers": SMALL | {"channel_multipliers": [1, 1, 3, 2], "norm_groups": 16, "latent_channels": 3},
    "grey": SMALL | {"in_channels": 1},
    "vq": SMALL | {"regularizer": CODEBOOK},
    "vq attention": SMALL | {"regularizer": CODEBOOK, "attention_factors": [4]},
    "vq no attention": SMALL | {"regularizer": CODEBOOK, "middle_attention": False},
}


def random_autoencoder(node):
    """Every tensor is drawn, normalisations included, so that no two can be exchanged unnoticed; not calibrated."""
    autoencoder = build(node).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        codebook = getattr(autoencoder.regularizer, "codebook", None)
        if codebook is not None:  # spread out: a float's last digit must not choose between codes
            autoencoder.regularizer.set_codebook(torch.randn(codebook.shape, generator=generator))
    return autoencoder


def images(node, size=16, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, node.get("in_channels", 3), size, size, generator=generator) * 2 - 1


def same(first, second):
    """The same names with the same bits, NaN included."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(-7), second[name].nan_to_num(-7)) for name in first
    )


def learned(autoencoder):
    """The state dict without a codebook's counters, which only our own checkpoints hold."""
    counters = {f"regularizer.{name}" for name, _ in autoencoder.regularizer.named_buffers()}
    return {name: value for name, value in autoencoder.state_dict().items() if name not in counters}
