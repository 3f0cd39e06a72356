r"""The patch discriminator: one logit for each overlapping patch of an image, real or reconstructed.

Each logit sees a patch of 70 px with three layers (Isola et al., "Image-to-Image Translation with Conditional
Adversarial Networks", 2017, appendix 6.1.2: C64-C128-C256-C512). It is trained by one of two pairs of losses, with D
the logits, x images and y reconstructions; means are over images and patches:

    hinge            1/2 E max(0, 1 - D(x)) + 1/2 E max(0, 1 + D(y)),     generator  -E D(y)
    non-saturating   1/2 E softplus(-D(x))  + 1/2 E softplus(D(y)),       generator  E softplus(-D(y))

Lim and Ye, "Geometric GAN", 2017, section 4; Goodfellow et al., "Generative Adversarial Nets", 2014, section 3. The
halves are those of Esser et al. 2021: at D = 0 the hinge loss is 1 and the other one log 2.

Letters: B batch, C channels, H and W image height and width, h and w those of the grid of patches.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm_train.distributed import all_reduce_sum, world_size

Norm = Literal["batch", "spectral", "none"]

_INIT_STD = 0.02
_SLOPE = 0.2
_MAX_WIDENING = 8


class AdversarialForm(NamedTuple):
    """A pair of losses, scalars both.

    Attributes:
        discriminator: the logits of images and of reconstructions -> the discriminator's loss.
        generator: the logits of reconstructions -> the generator's loss.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def _non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


HINGE = AdversarialForm(_hinge, lambda fake: -fake.mean())
NON_SATURATING = AdversarialForm(_non_saturating, lambda fake: F.softplus(-fake).mean())


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks. Its adjoint is itself, as often as it is differentiated."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of the batch over all ranks, so that 2 ranks equal 1 process.

    It is `nn.BatchNorm2d` where there is one process. Unlike `nn.SyncBatchNorm` it runs on the CPU as well, and can be
    differentiated twice, as a penalty on gradients needs.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w); statistics in float32 at least."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        count = values.new_full((1,), values.numel() / values.shape[1])
        total = _SumOverRanks.apply(torch.cat([values.sum((0, 2, 3)), count]))
        total, count = total[:-1], total[-1].detach()
        mean = total / count
        centred = values - mean.view(1, -1, 1, 1)
        # A second reduction, since E x^2 - (E x)^2 loses the digits in which the variance lies.
        variance = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1)).to(x.dtype)

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        """Move the running statistics, which evaluation uses."""
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased_variance, self.momentum)


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) to the logits (B, 1, h, w) of their patches; positive is real.

    Args:
        channels: width of the first layer; it doubles from layer to layer, up to eight times.
        num_layers: layers that halve the resolution; a logit sees 34 px with 2 of them, 70 px with 3.
        norm: `batch` as published, its statistics taken over all ranks; `spectral`, which bounds each layer's
            Lipschitz constant (Miyato et al. 2018) and leaves the examples of a batch independent; or `none`.
        in_channels: channels of an image.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, norm: Norm = "batch", in_channels: int = 3) -> None:
        super().__init__()
        if channels < 1 or num_layers < 1:
            raise ValueError(
                f"channels are {channels} and num_layers {num_layers}; allowed are numbers from 1; change "
                "`adversarial.discriminator.channels` or `adversarial.discriminator.num_layers`"
            )
        if norm not in ("batch", "spectral", "none"):
            raise ValueError(
                f"norm is {norm!r}; allowed are batch, spectral and none; change `adversarial.discriminator.norm`"
            )
        self.num_layers = num_layers
        widths = [channels * min(2**layer, _MAX_WIDENING) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [_convolution(in_channels, widths[0], 2, norm), nn.LeakyReLU(_SLOPE)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            # The normalisation takes the mean away, and with it a bias.
            layers.append(_convolution(widths[layer - 1], widths[layer], stride, norm, bias=norm != "batch"))
            layers += [_batch_norm(widths[layer])] if norm == "batch" else []
            layers.append(nn.LeakyReLU(_SLOPE))
        layers.append(_convolution(widths[-1], 1, 1, norm))
        self.layers = nn.Sequential(*layers)

    @property
    def smallest_image(self) -> int:
        """Pixels that height and width of an image must have for there to be one patch."""
        return 3 * 2**self.num_layers

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W) in [-1, 1]
    ) -> Tensor:  # (B, 1, h, w), h = H // 2^num_layers - 2
        """Judge each patch.

        Raises:
            ValueError: if the images are smaller than one patch.
        """
        self.require_size(*x.shape[-2:])
        return self.layers(x)

    def require_size(self, height: int, width: int) -> None:
        """Refuse, with ValueError, images of fewer pixels than a patch."""
        if min(height, width) < self.smallest_image:
            raise ValueError(
                f"images are {height} x {width}, too small for a discriminator of {self.num_layers} layers; allowed "
                f"are {self.smallest_image} x {self.smallest_image} and more; change "
                "`adversarial.discriminator.num_layers` or `image_size`"
            )


def _convolution(c_in: int, c_out: int, stride: int, norm: Norm, bias: bool = True) -> nn.Module:
    convolution = nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=bias)
    nn.init.normal_(convolution.weight, 0.0, _INIT_STD)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return spectral_norm(convolution) if norm == "spectral" else convolution


def _batch_norm(channels: int) -> nn.Module:
    norm = GlobalBatchNorm2d(channels)
    nn.init.normal_(norm.weight, 1.0, _INIT_STD)
    return norm
