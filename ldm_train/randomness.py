"""Random numbers as a function of (seed, epoch, sample id): no state, no rank, no worker, no luck.

A counter-based generator (Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
encrypts a counter with a key and calls the result random. Here

    key     = (seed, stream)                      what the draw is for
    counter = (block, epoch, sample id)           which draw it is

so the noise of a sample is the same on 1 process and on 64, on CPU and on GPU, before and after a resume; and two
samples never share it. Streams keep draws for different purposes apart. Everything is integer tensor arithmetic and
runs where `sample_id` lives.
"""

import math
from enum import IntEnum
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    NOISE = 0
    TIMESTEP = 1
    POSTERIOR = 2
    CONDITION_DROP = 3
    AUGMENTATION = 4
    SAMPLING = 5
    INITIALISATION = 6
    DEGRADATION = 7
    MASK = 8
    OFFSET_NOISE = 9
    INPUT_PERTURBATION = 10
    CONDITION_NOISE = 11
    BOUND = 12
    DROPOUT = 13
    CAPTION = 14


class SampleKeys(NamedTuple):
    """What every draw made for the B samples of a batch is a function of.

    Attributes:
        seed: the run's seed.
        epoch: the epoch.
        sample_id: (B,) int64.
        position: (B,) int64, places in the order of the epoch, consecutive over the processes of a step; for draws that
            are spread evenly over a batch instead of independently.
    """

    seed: int
    epoch: int
    sample_id: Tensor
    position: Tensor


def visit_id(sample_id: Tensor, visits: Tensor) -> Tensor:
    """Sample ids that tell visits within an epoch apart: the visit's number above the lowest 40 bits, (B,) int64.

    Visit 0 keeps the sample's own id, so that nothing changes where no sample comes twice in an epoch.

    Args:
        sample_id: (B,) int64 below 2^40.
        visits: (B,) int64; equal for equal low 23 bits.
    """
    return sample_id + ((visits & 0x7FFFFF) << 40)


def _multiply_wide(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit operands, within int64: 16-bit halves keep every product below 2^49."""
    low_product = (b & 0xFFFF) * a
    high_product = (b >> 16) * a + (low_product >> 16)
    return (high_product >> 16) & _MASK, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of Salmon et al. (2011), section 3.3.

    Args:
        counter: four int64 tensors of one shape (or broadcastable) holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words, uniform on [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_wide(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_wide(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, epoch: int, sample_id: Tensor, stream: Stream, count: int) -> Tensor:
    """`count` independent 32-bit words for each sample.

    Args:
        seed: the run's seed; its low 64 bits count.
        epoch: the epoch, 32 bits.
        sample_id: (B,) int64.
        stream: what the draw is for.
        count: words per sample.

    Returns:
        (B, count) int64 in [0, 2^32), on the device of `sample_id`.
    """
    ids = sample_id.to(torch.int64)[:, None]
    block = torch.arange(math.ceil(count / 4), device=ids.device)[None, :]
    counter = (block, torch.full_like(block, epoch & _MASK), ids & _MASK, (ids >> 32) & _MASK)
    # The stream sits in the key's top byte: seeds below 2^56 never meet another stream.
    key = (seed & _MASK, ((seed >> 32) & _MASK) ^ (int(stream) << 24))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, key)), dim=-1)
    return words.flatten(1)[:, :count]


def uniform(seed: int, epoch: int, sample_id: Tensor, stream: Stream, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform draws on [0, 1), one tensor of `shape` per sample: (B, *shape) float32."""
    words = random_words(seed, epoch, sample_id, stream, prod(shape))
    # 24 bits fill a float32 mantissa exactly, so 1.0 is never returned.
    return ((words >> 8).to(torch.float32) * 2.0**-24).reshape(-1, *shape)


def normal(seed: int, epoch: int, sample_id: Tensor, stream: Stream, shape: tuple[int, ...]) -> Tensor:
    """Standard normal draws, one tensor of `shape` per sample: (B, *shape) float32.

    Box and Muller (1958): sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) with u, v uniform on (0, 1].
    """
    count = prod(shape)
    words = random_words(seed, epoch, sample_id, stream, count + count % 2)
    u, v = ((words.to(torch.float32) + 0.5) * 2.0**-32).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), 2.0 * math.pi * v
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape)
