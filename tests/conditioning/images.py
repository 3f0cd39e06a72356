"""Batches of images and a first stage, for conditioners that are images themselves."""

import torch
from torch import nn
from torch.nn import functional as F


class Averages(nn.Module):
    """A first stage whose latents can be told: averages of f x f pixels, and the red average once more."""

    latent_channels = 4

    def __init__(self, downsampling_factor=4):
        super().__init__()
        self.downsampling_factor = downsampling_factor
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, x, noise=None):
        means = self.weight * F.avg_pool2d(x, self.downsampling_factor)
        return torch.cat((means, means[:, :1]), dim=1)


def batch_of(count=6, size=16, epoch=0, first=0, **entries):
    """`count` images of noise, the same for the same sample id in any batch."""
    ids = torch.arange(first, first + count)
    images = [torch.rand(3, size, size, generator=torch.Generator().manual_seed(int(i))) * 2 - 1 for i in ids]
    return {
        "image": torch.stack(images),
        "caption": [f"image {int(i)}" for i in ids],
        "sample_id": ids,
        "position": torch.arange(count),
        "epoch": epoch,
        "key": [str(int(i)) for i in ids],
        **entries,
    }


def rows(batch, chosen):
    """Some of a batch's samples."""

    def of(entry):
        if torch.is_tensor(entry):
            return entry[chosen]
        return [entry[i] for i in chosen] if isinstance(entry, list) else entry

    return {name: of(entry) for name, entry in batch.items()}


def assert_contract(conditioner, batch, first_stage):
    """Null is full drop and the same for all; drop is per example; examples do not mix; channels are as declared."""
    count = len(batch["sample_id"])
    given, null = conditioner(batch, first_stage), conditioner.null(batch, first_stage)
    drop = torch.arange(count) % 2 == 0
    mixed = conditioner(batch, first_stage, drop)
    alone = [conditioner(rows(batch, [i]), first_stage) for i in range(count)]
    assert given.concat.shape[1] == conditioner.concat_channels
    assert given.concat.shape[-1] == batch["image"].shape[-1] // first_stage.downsampling_factor
    assert (given.vector is None) == (conditioner.vector_dim is None)
    for name in ("concat", "vector"):
        if getattr(given, name) is None:
            continue
        g, n, m = (getattr(entry, name) for entry in (given, null, mixed))
        torch.testing.assert_close(n, n[:1].expand_as(n))
        torch.testing.assert_close(m[drop], n[drop])
        torch.testing.assert_close(m[~drop], g[~drop])
        torch.testing.assert_close(g, torch.cat([getattr(entry, name) for entry in alone]))
        assert not torch.allclose(g, n)
