"""The published first stages (Rombach et al. 2022, tables 8 and 12), as the options of `autoencoder` describe them."""

import hydra
import pytest
import torch

from ldm_train.nn.discriminator import PatchDiscriminator
from tests.conftest import composed

PUBLISHED = {
    # option: (parameters, downsampling factor, latent channels, codes)
    "kl_f4": (55_312_063, 4, 3, None),
    "kl_f8": (83_653_863, 8, 4, None),
    "kl_f16": (69_610_963, 16, 16, None),
    "kl_f32": (103_880_131, 32, 64, None),
    "vq_f4": (55_322_782, 4, 3, 8192),
    "vq_f4_noattn": (53_219_486, 4, 3, 8192),
    "vq_f8": (67_717_295, 8, 4, 16384),
    "vq_f8_n256": (67_652_783, 8, 4, 256),
    "vq_f16": (69_593_371, 16, 8, 16384),
}
HALVES = {
    # option: (encoder, decoder)
    "kl_f4": (22_351_238, 32_960_771),
    "kl_f8": (34_163_592, 49_490_179),
    "kl_f16": (28_265_760, 41_343_875),
    "kl_f32": (42_614_656, 61_244_803),
}


def built(option):
    """The autoencoder of a config, without memory for its weights."""
    cfg = composed("stage=autoencoder", f"autoencoder={option}")
    with torch.device("meta"):
        return hydra.utils.instantiate(cfg.autoencoder, _convert_="all")


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("option", PUBLISHED)
def test_autoencoders_have_the_published_size(option):
    model = built(option)
    codes = model.regularizer.codebook_size
    assert (size(model), model.downsampling_factor, model.latent_channels, codes) == PUBLISHED[option]


@pytest.mark.parametrize("option", HALVES)
def test_encoders_and_decoders_have_the_published_size(option):
    model = built(option)
    assert (size(model.encoder), size(model.decoder)) == HALVES[option]


def test_stable_diffusion_s_first_stage_has_248_weights():
    model = built("kl_f8")
    assert len(list(model.parameters())) == 248
    assert set(model.state_dict()) - {name for name, _ in model.named_parameters()} == {"latent_mean", "latent_std"}


@pytest.mark.parametrize(("num_layers", "parameters"), [(3, 2_765_633), (2, 663_361)])
def test_discriminators_have_the_published_size(num_layers, parameters):
    with torch.device("meta"):
        assert size(PatchDiscriminator(channels=64, num_layers=num_layers)) == parameters
