"""Embeddings of the time t: sinusoids of geometrically spaced frequencies, then a small network.

    e(t) = [cos(t w_0), ..., cos(t w_{D/2-1}), sin(t w_0), ...],   w_i = max_period^(-i / (D/2))

(Vaswani et al. 2017, section 3.5; cosines first, as in the published diffusion U-Nets.)
"""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed times (B,) into (B, dim) float32; `dim` must be even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.to(torch.float32)[:, None] * frequencies[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids followed by Linear, SiLU, Linear.

    Args:
        channels: width D of the sinusoidal embedding.
        out_channels: width E of the result.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(nn.Linear(channels, out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels))

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to (B, E)."""
        dtype = next(self.layers.parameters()).dtype
        return self.layers(sinusoidal_embedding(t, self.channels).to(dtype))


class VectorEmbedding(nn.Sequential):
    """A pooled vector (B, D) to the width E of the time embedding, to which it is added: Linear, SiLU, Linear."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__(nn.Linear(dim, out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels))
