"""Small stages, whole in kind: every part is the real one."""

from functools import partial

import torch

from ldm_train.conditioning import TransformerTextConditioner
from ldm_train.diffusion import ClassifierFreeGuidance, DDIMSampler, Denoiser, DiffusionObjective, cosine_schedule
from ldm_train.nn import (
    AdversarialLoss,
    Autoencoder,
    AutoencoderLoss,
    KLRegularizer,
    PatchDiscriminator,
    UNet,
    VectorQuantizer,
)
from ldm_train.stages import AutoencoderStage, EncodedMoments, LatentDiffusion

CAPTIONS = ["red apple", "blue car", "green tree", "yellow sun"]


def batch(count=4, epoch=0, first=0):
    generator = torch.Generator().manual_seed(first)
    return {
        "image": torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1,
        "caption": [CAPTIONS[(first + i) % 4] for i in range(count)],
        "sample_id": torch.arange(first, first + count),
        "position": torch.arange(first, first + count),
        "epoch": epoch,
        "key": [str(first + i) for i in range(count)],
    }


def autoencoder(calibrated=True, regularizer=None):
    torch.manual_seed(0)
    model = Autoencoder(regularizer or KLRegularizer(), 4, 16, (1, 2), num_res_blocks=1, norm_groups=8)
    if calibrated:
        model.calibrate(torch.full((4,), 0.1), torch.full((4,), 0.9))
    return model


def optimizer():
    return partial(torch.optim.SGD, lr=0.01)


def adversarial(**changes):
    torch.manual_seed(2)
    return AdversarialLoss(PatchDiscriminator(8, num_layers=1), **({"start": 0} | changes))


def quantizer(**changes):
    torch.manual_seed(3)
    return VectorQuantizer(**({"codebook_size": 16, "latent_channels": 4} | changes))


def autoencoder_stage(regularizer=None, adversary=None, calibrated=False, **changes):
    loss = AutoencoderLoss(adversarial=adversary)
    arguments = {"optimizer": optimizer(), "lr_scheduler": None, "seed": 0, "image_size": 16} | changes
    return AutoencoderStage(autoencoder(calibrated, regularizer), loss, **arguments)


def diffusion_parts():
    torch.manual_seed(1)
    unet = UNet(4, 4, 16, (1, 2), 1, (2,), context_dim=16, num_heads=2, norm_groups=8)
    return {
        "denoiser": Denoiser(unet, cosine_schedule(100), "v"),
        "autoencoder": autoencoder(),
        "conditioner": TransformerTextConditioner(16, 8, num_layers=1, num_heads=2, token_dim=4),
        "objective": DiffusionObjective(),
        "sampler": DDIMSampler(4),
        "guidance": ClassifierFreeGuidance(2.0),
        "optimizer": optimizer(),
        "lr_scheduler": None,
        "moments": EncodedMoments(),
        "posterior": "sample",
        "seed": 0,
    }


def latent_diffusion(**changes):
    return LatentDiffusion(**(diffusion_parts() | changes))
