import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm_train.nn import VectorQuantizer
from tests.ranks import run_ranks

RECIPES = {
    "loss": {"restart_after": 2},
    "ema": {"update": "ema", "ema_decay": 0.9, "initialisation": "k_means", "restart_after": 2},
    "cosine": {"distance": "cosine", "initialisation": "k_means", "gradient": "rotation", "restart_after": 2},
}
STEPS = 6


def _normal(seed):
    return torch.randn(6, 3, 2, 3, generator=torch.Generator().manual_seed(seed))


class _Encoder(nn.Module):
    """One layer before the quantizer, so that gradients reach weights through the codes."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 1)
        self.quantizer = VectorQuantizer(24, 3, usage_window=2, **options)
        self.quantizer.codebook.data *= 24  # spread like the latents

    def forward(self, x, noise):
        return self.quantizer(self.layer(x), noise)


def _trained(options, rank, world):
    """State, last gradients and last log after some steps on a part of the images."""
    module = _Encoder(**options)
    forward = DistributedDataParallel(module) if world > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(STEPS):
        x, noise = (_normal(seed + step)[rank::world] for seed in (10, 100))
        result = forward(x, noise)
        optimizer.zero_grad()
        (result.z.square().mean() + result.loss.mean()).backward()
        optimizer.step()
    log = {name: value for name, value in result.log.items() if name != "commitment"}  # that of the rank's own images
    return module.state_dict(), {n: p.grad for n, p in module.named_parameters()}, log


def _one_rank(rank, init_file, world):
    expected = {name: _trained(options, 0, 1) for name, options in RECIPES.items()}  # there is no group yet
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    for name, options in RECIPES.items():
        torch.testing.assert_close(_trained(options, rank, world), expected[name], rtol=1e-5, atol=1e-6)
        assert int((expected[name][0]["quantizer.age"] < STEPS - 1).sum()) > 0, "no code was restarted"
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_with_half_the_images_each_equal_one_process(tmp_path):
    run_ranks(_one_rank, tmp_path / "rendezvous", 2)
