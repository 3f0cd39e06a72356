"""The autoencoder: images to latents f times smaller and back (Rombach et al. 2022, section 3.1 and appendix G).

    z = E(x),   x of (3, H, W) in [-1, 1],   z of (C, H/f, W/f),   f = 2^(levels - 1)

Diffusion wants latents of zero mean and unit variance. They are normalised here and nowhere else: `encode` returns
(z - latent_mean) / latent_std from buffers that are measured after training and travel in the checkpoint; until then
they hold NaN and `encode` refuses. With `conf/autoencoder/kl_f8.yaml` the network is Stable Diffusion 1's: 83,653,863
parameters in 248 tensors.

Letters: B batch, C latent channels, H and W image height and width, h and w those of the latents.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ldm_train.nn.pyramid import Decoder, Encoder, Pyramid
from ldm_train.nn.regularizer import Regularized, Regularizer
from ldm_train.nn.tiling import tiled

_MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Autoencoder(nn.Module):
    """Encoder, regularizer and decoder around normalised latents.

    Args:
        regularizer: turns the encoder's output into latents, see `ldm_train.nn.regularizer`.
        latent_channels: C.
        channels: width of the first level.
        channel_multipliers: width of each level in units of `channels`; f = 2^(levels - 1).
        num_res_blocks: residual blocks a level (one more in the decoder).
        attention_factors: downsampling factors at which self-attention stands, besides the middle.
        middle_attention: self-attention in the middle.
        norm_groups: groups of the normalisations; must divide every width.
        in_channels: channels of an image.
        checkpoint_factors: downsampling factors of the levels whose activations are computed again in the backward pass
            instead of being kept, see `ldm_train.nn.pyramid`.
        memory_format: `contiguous` or `channels_last`: how weights and activations lie in memory; values are the same.
        tile_size: height and width in pixels above which images are encoded and decoded in tiles, if no gradient is
            wanted; `None`: never. See `ldm_train.nn.tiling`.
        tile_overlap: pixels that neighbouring tiles share at least.

    Raises:
        ValueError: if the arguments describe no network.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        regularizer: Regularizer,
        latent_channels: int,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_factors: Sequence[int] = (),
        middle_attention: bool = True,
        norm_groups: int = 32,
        in_channels: int = 3,
        checkpoint_factors: Sequence[int] = (),
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
        tile_size: int | None = None,
        tile_overlap: int = 128,
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(
            channels,
            tuple(channel_multipliers),
            num_res_blocks,
            tuple(attention_factors),
            middle_attention,
            norm_groups,
            tuple(checkpoint_factors),
        )
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.downsampling_factor = self.pyramid.factor
        _check(latent_channels, memory_format, tile_size, tile_overlap, self.downsampling_factor)
        self.tile_size, self.tile_overlap = tile_size, tile_overlap
        moments = regularizer.moments_per_channel * latent_channels
        self.encoder = Encoder(in_channels, moments, self.pyramid)
        self.to_moments = nn.Conv2d(moments, moments, 1)
        self.regularizer = regularizer
        self.from_latents = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, in_channels, self.pyramid)
        self._known_calibrated = False
        statistics = torch.full((1, latent_channels, 1, 1), math.nan)
        self.register_buffer("latent_mean", statistics.clone())
        self.register_buffer("latent_std", statistics)
        self.memory_format = _MEMORY_FORMATS[memory_format]
        self.to(memory_format=self.memory_format)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Regularized]:
        """Reconstruct images (B, 3, H, W); with the latents' regularizer result. `noise` as in `encode`."""
        regularized = self.regularizer(self.moments(x), noise)
        return self.decode_raw(regularized.z), regularized

    def moments(self, x: Tensor) -> Tensor:
        """The encoder's output for images (B, 3, H, W): what the regularizer reads, (B, k C, h, w).

        Raises:
            ValueError: if the images are of another shape, or no floating-point numbers.
        """
        self._check_images(x)
        return self._in_tiles(self._encoded, x, in_cell=self.downsampling_factor, out_cell=1)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images to normalised latents.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w) for a draw from the posterior; `None` for its mode.

        Returns:
            (B, C, h, w) of about zero mean and unit variance.

        Raises:
            RuntimeError: if the latents were never calibrated.
            ValueError: if the images are of another shape, or no floating-point numbers.
        """
        moments = self.moments(x)
        z = self.regularizer.mode(moments) if noise is None else self.regularizer.draw(moments, noise)
        return self.normalise(z)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, H, W), unclamped; in float32 even under autocast."""
        self.require_calibration()
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents are of shape {tuple(latents.shape)}; allowed is (B, {self.latent_channels}, h, w); change "
                "`autoencoder.latent_channels` to the checkpoint's"
            )
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float() * self.latent_std + self.latent_mean
            return self.decode_raw(self.regularizer.project(z))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the regularizer gives them, not normalised, to images (B, 3, H, W), unclamped."""
        return self._in_tiles(self._decoded, z, in_cell=1, out_cell=self.downsampling_factor)

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents to zero mean and unit variance."""
        self.require_calibration()
        return (z - self.latent_mean) / self.latent_std

    @property
    def last_weight(self) -> Tensor:
        """The weight of the decoder's last convolution, through which every gradient of a loss on images passes."""
        return self.decoder.conv_out.weight

    @property
    def is_calibrated(self) -> bool:
        """Whether the latents' mean and standard deviation have been measured."""
        # Reading a buffer waits for the GPU: once true, the answer is remembered.
        self._known_calibrated = self._known_calibrated or bool(torch.isfinite(self.latent_std).all())
        return self._known_calibrated

    def calibrate(self, mean: Tensor, std: Tensor) -> None:
        """Set the statistics of the raw latents; each (C,) or (1, C, 1, 1), `std` positive."""
        if not bool((std > 0).all()):
            raise ValueError(
                f"latent standard deviations are {std.flatten().tolist()}; allowed are positive numbers; a channel "
                "without variance has collapsed: lower `autoencoder.regularizer.weight` or train longer"
            )
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))

    def forget_calibration(self) -> None:
        """Back to the state before `calibrate`: latents are refused."""
        self.latent_mean.fill_(math.nan)
        self.latent_std.fill_(math.nan)
        self._known_calibrated = False

    def require_calibration(self) -> None:
        """Refuse, with RuntimeError, to go on with latents of unknown scale."""
        if not self.is_calibrated:
            raise RuntimeError(
                "the autoencoder's latents are not calibrated (latent_std is NaN); a calibrated checkpoint is needed, "
                "which stage 1 writes at its end; set `stage.autoencoder.checkpoint` to one"
            )

    def _encoded(self, x: Tensor) -> Tensor:
        return self.to_moments(self.encoder(x.contiguous(memory_format=self.memory_format)))

    def _decoded(self, z: Tensor) -> Tensor:
        return self.decoder(self.from_latents(z.contiguous(memory_format=self.memory_format)))

    def _in_tiles(self, function: Callable[[Tensor], Tensor], x: Tensor, in_cell: int, out_cell: int) -> Tensor:
        """`function(x)`, in tiles if these are asked for and nothing is kept for a backward pass anyway."""
        trained = x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        if self.tile_size is None or (trained and torch.is_grad_enabled()):
            return function(x)
        size, overlap = (pixels // self.downsampling_factor for pixels in (self.tile_size, self.tile_overlap))
        return tiled(function, x, size, overlap, in_cell, out_cell)

    def _check_images(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"images are of shape {tuple(x.shape)}; allowed is (B, {self.in_channels}, H, W); change "
                "`autoencoder.in_channels`, or `data` to images of so many channels"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"images are of type {x.dtype}; allowed are floating-point numbers in [-1, 1], for bytes "
                "`x / 127.5 - 1`; change `data` to one that gives them"
            )
        height, width = x.shape[-2:]
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise ValueError(
                f"images are {height} x {width}; allowed are multiples of {self.downsampling_factor}, the "
                "autoencoder's downsampling factor f; change `image_size`, or choose another `autoencoder`"
            )


def _check(latent_channels: int, memory_format: str, tile_size: int | None, tile_overlap: int, factor: int) -> None:
    """Refuse, with ValueError, what `Pyramid` does not look at."""
    if latent_channels < 1:
        raise ValueError(
            f"latent_channels is {latent_channels}; allowed are numbers from 1; change `autoencoder.latent_channels`"
        )
    if memory_format not in _MEMORY_FORMATS:
        raise ValueError(
            f"memory_format is {memory_format!r}; allowed are {' and '.join(_MEMORY_FORMATS)}; change "
            "`autoencoder.memory_format`"
        )
    if tile_size is not None and (tile_size < 1 or tile_size % factor):
        raise ValueError(
            f"tile_size is {tile_size}; allowed are multiples of {factor}, the downsampling factor f, and null; change "
            "`autoencoder.tile_size`"
        )
    if tile_size is not None and (tile_overlap % factor or not 0 <= tile_overlap < tile_size):
        raise ValueError(
            f"tile_overlap is {tile_overlap}; allowed are multiples of {factor}, the downsampling factor f, from 0 and "
            f"below the tile_size of {tile_size}; change `autoencoder.tile_overlap` or `autoencoder.tile_size`"
        )
