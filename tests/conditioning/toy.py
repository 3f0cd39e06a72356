"""Small conditioners and the batches they read."""

import torch

from ldm_train.conditioning import CLIPTextConditioner, CLIPTextEncoder
from ldm_train.nn import Autoencoder, KLRegularizer

CAPTIONS = ["red apple, a fruit emoji", "blue car", "a very " + "very " * 40 + "long caption", ""]
NUM_CLASSES = 5


def batch(captions=CAPTIONS):
    """B examples, the same at every call; of all, or of some captions."""
    index = torch.tensor([CAPTIONS.index(caption) if caption in CAPTIONS else 0 for caption in captions])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(CAPTIONS), 3, 16, 16, generator=generator) * 2 - 1
    maps = torch.randint(NUM_CLASSES, (len(CAPTIONS), 16, 16), generator=generator)
    return {
        "image": images[index],
        "caption": list(captions),
        "sample_id": index + 100,
        "position": index,
        "epoch": 0,
        "key": [str(i) for i in index.tolist()],
        "label": torch.tensor([3, 0, 4, 3])[index],
        "segmentation": maps[index],
        "original_size": torch.tensor([[512, 768], [16, 16], [300, 200], [64, 64]])[index],
        "crop": torch.tensor([[0, 4], [0, 0], [4, 0], [0, 0]])[index],
    }


def first_stage():
    """A calibrated autoencoder of factor 2."""
    torch.manual_seed(1)
    model = Autoencoder(KLRegularizer(), 4, 16, (1, 2), num_res_blocks=1, norm_groups=8)
    model.calibrate(torch.full((4,), 0.1), torch.full((4,), 0.9))
    return model.requires_grad_(False).eval()


def clip_encoder(**changes):
    """A CLIP text encoder with weights that tell any two tensors apart."""
    torch.manual_seed(2)
    encoder = CLIPTextEncoder(**({"width": 32, "num_layers": 3, "num_heads": 2, "context_length": 12} | changes))
    for parameter in encoder.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return encoder


def clip(padding="end", vector_dim=None, **changes):
    encoder = clip_encoder(**changes)
    return CLIPTextConditioner(encoder, encoder.width, padding, vector_dim)
