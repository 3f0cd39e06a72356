r"""The adversarial part of the autoencoder's loss: a discriminator that learns, and what the decoder learns from it.

With the discriminator D, images x and their reconstructions y, the stage minimises with one optimizer and one backward

    L_reconstruction + L_regularizer + weight lambda L_generator(D'(y)) + L_discriminator(D(x), D(y'))

where D' has constant parameters and y' is a constant, so that neither term reaches the other's network. The adaptive
weight makes the generator term pull as hard as the reconstruction at the decoder's last weight w (Esser et al.,
"Taming Transformers for High-Resolution Image Synthesis", 2021, eq. 7):

    lambda = |grad_w L_reconstruction| / (|grad_w L_generator| + 1e-4),      at most `max_adaptive_weight`.

Two penalties on the discriminator are optional:

    R1      r1_weight / 2  E |grad_x D(x)|^2                             (Mescheder et al. 2018, eq. 9)
    LeCAM   lecam_weight  (E (D(x) - a_y)^2 + E (D(y) - a_x)^2)          (Tseng et al. 2021, R_LC)

In R1, D(x) is the sum of an image's logits. It costs a second differentiation, so it is computed every `r1_every` steps
only, times `r1_every` (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", section 3.1). In
LeCAM, a_x and a_y are the exponential averages of the logits of images and of reconstructions, without a bias to zero.

Everything is defined on the batch of all ranks: the gradients of 2 ranks, averaged, are those of 1 process.

Letters: B batch, H and W image height and width.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm_train.distributed import all_reduce_mean
from ldm_train.nn.discriminator import HINGE, NON_SATURATING

_EPSILON = 1e-4
_FORMS = {"hinge": HINGE, "non_saturating": NON_SATURATING}


class Clock(NamedTuple):
    """How far the training is.

    Attributes:
        step: optimizer steps taken.
        images: images trained on, over all ranks.
    """

    step: int
    images: int


class AdversarialTerms(NamedTuple):
    """What is added to the loss.

    Attributes:
        generator: scalar, weighted; reaches the reconstruction, never the discriminator.
        discriminator: scalar; reaches the discriminator, never the reconstruction.
        log: detached scalars to log, by name, before any weight; a name is absent where nothing was computed.
    """

    generator: Tensor
    discriminator: Tensor
    log: dict[str, Tensor]


class AdversarialLoss(nn.Module):
    """A discriminator, its training, and the adaptive weight of what it teaches.

    Training has three phases. Before `start` the discriminator is idle; then it learns alone for the length of
    `warmup`; then the generator term begins as well.

    Args:
        discriminator: images (B, 3, H, W) to logits, see `PatchDiscriminator`.
        form: `hinge` or `non_saturating`, see `ldm_train.nn.discriminator`.
        weight: of the generator term, on top of the adaptive weight.
        adaptive: balance the generator term with the reconstruction; otherwise `weight` alone counts.
        max_adaptive_weight: the cap of the adaptive weight.
        start: when the discriminator begins to learn, in `unit`s.
        warmup: how long it learns before the generator term begins, in `unit`s.
        unit: `steps` of the optimizer, or `images` of all ranks.
        r1_weight: of the penalty on the gradient at images; 0 is off.
        r1_every: steps from one computation of that penalty to the next.
        lecam_weight: of the penalty on logits that leave their averages; 0 is off.
        lecam_decay: decay of those averages, per forward pass.
    """

    logit_averages: Tensor
    logit_averages_weight: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        form: Literal["hinge", "non_saturating"] = "hinge",
        weight: float = 0.5,
        adaptive: bool = True,
        max_adaptive_weight: float = 1e4,
        start: int = 50_000,
        warmup: int = 0,
        unit: Literal["steps", "images"] = "steps",
        r1_weight: float = 0.0,
        r1_every: int = 16,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.99,
    ) -> None:
        super().__init__()
        _require(form in _FORMS, "form", form, " and ".join(_FORMS))
        _require(unit in ("steps", "images"), "unit", unit, "steps and images")
        _require(max_adaptive_weight > 0, "max_adaptive_weight", max_adaptive_weight, "numbers above 0")
        _require(r1_every >= 1, "r1_every", r1_every, "whole numbers from 1")
        _require(0 <= lecam_decay < 1, "lecam_decay", lecam_decay, "numbers from 0 to below 1")
        _require(weight >= 0, "weight", weight, "numbers from 0")
        _require(start >= 0, "start", start, "whole numbers from 0")
        _require(warmup >= 0, "warmup", warmup, "whole numbers from 0")
        _require(r1_weight >= 0, "r1_weight", r1_weight, "numbers from 0")
        _require(lecam_weight >= 0, "lecam_weight", lecam_weight, "numbers from 0")
        self.discriminator = discriminator
        self.form = _FORMS[form]
        self.weight = weight
        self.adaptive = adaptive
        self.max_adaptive_weight = max_adaptive_weight
        self.start = start
        self.warmup = warmup
        self.unit = unit
        self.r1_weight = r1_weight
        self.r1_every = r1_every
        self.lecam_weight = lecam_weight
        self.lecam_decay = lecam_decay
        # There with and without LeCAM: a checkpoint's names do not depend on options.
        self.register_buffer("logit_averages", torch.zeros(2))  # of images, of reconstructions
        self.register_buffer("logit_averages_weight", torch.zeros(()))

    def is_active(self, clock: Clock) -> bool:
        """Whether the discriminator learns."""
        return self._elapsed(clock) >= self.start

    def reaches_generator(self, clock: Clock) -> bool:
        """Whether the generator term is there."""
        return self._elapsed(clock) >= self.start + self.warmup

    def forward(
        self,
        x: Tensor,
        reconstruction: Tensor,
        reconstruction_loss: Tensor,
        last_weight: Tensor,
        clock: Clock,
    ) -> AdversarialTerms:
        """The terms of one training step; all ranks must call it together.

        Args:
            x: (B, 3, H, W) images in [-1, 1].
            reconstruction: (B, 3, H, W) with its graph.
            reconstruction_loss: scalar with its graph; pixel and perceptual loss, what the adaptive weight is against.
            last_weight: the weight of the decoder's last convolution.
            clock: decides the phase.

        Returns:
            Both terms, and to log: `loss_generator`, `adaptive_weight`, `loss_discriminator`, `logits_real`,
            `logits_fake`, `r1` (the mean squared norm of the gradient) and `lecam`. Before `start` both terms are zero
            and nothing is logged; the discriminator term then still depends on each of its parameters, with zero
            gradients, because distributed training waits for all gradients.
        """
        if not self.is_active(clock):
            nothing = 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
            return AdversarialTerms(reconstruction_loss.new_zeros(()), nothing, {})
        generator = reconstruction_loss.new_zeros(())
        generator_log: dict[str, Tensor] = {}
        if self.reaches_generator(clock):
            generator, generator_log = self._generator_term(reconstruction, reconstruction_loss, last_weight)
        discriminator, log = self._discriminator_term(x.detach(), reconstruction.detach(), clock)
        return AdversarialTerms(generator, discriminator, generator_log | log)

    def _elapsed(self, clock: Clock) -> int:
        return clock.step if self.unit == "steps" else clock.images

    def _generator_term(
        self, reconstruction: Tensor, reconstruction_loss: Tensor, last_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Constant parameters and copied buffers: this pass leaves no trace in the discriminator.
        constant = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        copied = {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        logits = functional_call(self.discriminator, constant | copied, (reconstruction.float(),))
        loss = self.form.generator(logits.float())
        log = {"loss_generator": loss.detach()}
        if not self.adaptive:
            return self.weight * loss, log
        log["adaptive_weight"] = self._adaptive_weight(reconstruction_loss, loss, last_weight)
        return self.weight * log["adaptive_weight"] * loss, log

    def _adaptive_weight(self, reconstruction_loss: Tensor, generator_loss: Tensor, last_weight: Tensor) -> Tensor:
        gradients = [
            torch.autograd.grad(loss, last_weight, retain_graph=True)[0]
            for loss in (reconstruction_loss, generator_loss)
        ]
        # Averaged before the norm is taken: every rank gets the weight of the joined batch.
        ours, theirs = all_reduce_mean(torch.stack(gradients).float()).flatten(1).norm(dim=1)
        return (ours / (theirs + _EPSILON)).clamp(max=self.max_adaptive_weight)

    def _discriminator_term(self, x: Tensor, reconstruction: Tensor, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        penalised = self.r1_weight > 0 and clock.step % self.r1_every == 0
        real, r1 = self._logits_and_r1(x) if penalised else (self.discriminator(x).float(), None)
        fake = self.discriminator(reconstruction.float()).float()
        loss = total = self.form.discriminator(real, fake)
        log = {
            "loss_discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }
        if r1 is not None:
            total = total + 0.5 * self.r1_weight * self.r1_every * r1
            log["r1"] = r1.detach()
        if self.lecam_weight > 0:
            lecam = self._lecam(real, fake)
            total = total + self.lecam_weight * lecam
            log["lecam"] = lecam.detach()
        return total, log

    def _logits_and_r1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of images and the mean squared norm of their gradients, in float32 even under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().requires_grad_()
            logits = self.discriminator(x)
            (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return logits, gradient.square().flatten(1).sum(1).mean()

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """Move the averages of the logits, then measure the distance from them."""
        means = all_reduce_mean(torch.stack([real.mean(), fake.mean()]))
        self.logit_averages.lerp_(means, 1.0 - self.lecam_decay)
        self.logit_averages_weight.lerp_(torch.ones_like(self.logit_averages_weight), 1.0 - self.lecam_decay)
        average_real, average_fake = self.logit_averages / self.logit_averages_weight
        return (real - average_fake).square().mean() + (fake - average_real).square().mean()


def _require(condition: bool, key: str, found: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {found!r}; allowed are {allowed}; change `adversarial.{key}`")
