r"""The vector-quantised regularizer: every latent is one of K codes.

The encoder's output z of C channels is replaced, at each position, by the nearest code e of a codebook (van den Oord
et al., "Neural Discrete Representation Learning", 2017, eq. 1-3; Esser et al., "Taming Transformers for
High-Resolution Image Synthesis", 2021, eq. 4). With sg the stop of gradients,

    loss = |sg(z) - e|^2 + commitment_weight |z - sg(e)|^2                                              `update: loss`

or, without the first term, codes follow the averages of the latents that took them (van den Oord et al. 2017,
appendix A.1): with n_k latents of sum s_k in this batch and decay d,                                    `update: ema`

    N_k <- d N_k + (1 - d) n_k,    m_k <- d m_k + (1 - d) s_k,    e_k = m_k / N_k

The decoder reads e. Its gradient reaches the encoder as if e were a map of z (`gradient`):

    straight_through    z + sg(e - z)
    rotation            sg(|e| / |z| R) z,  R the rotation of z / |z| to e / |e|   (Fifty et al., "Restructuring Vector
                        Quantization with the Rotation Trick", 2024)

`distance: cosine` compares directions: z and codes have length 1 throughout (Yu et al., "Vector-Quantized Image
Modeling with Improved VQGAN", 2022, section 3.2). `initialisation: k_means` starts from clusters of the first batch;
`restart_after` moves codes that nothing takes to latents of the present batch (both as in Zeghidour et al.,
"SoundStream: An End-to-End Neural Audio Codec", 2021, section III-C).

Whatever is learned outside the optimizer is learned from the latents of all ranks, and what is drawn follows the
samples' own noise: two ranks learn what one process learns from the joined batch.

Stage 2 learns to generate z itself; `project` then takes the nearest code before the decoder (Rombach et al. 2022,
section 3.1).

Letters: B batch, C latent channels, h and w height and width of the latents, K codes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.distributed import all_reduce_sum
from ldm_train.nn.codebook import code_counts, code_sums, draw_over_ranks, k_means, nearest_codes, perplexity
from ldm_train.nn.regularizer import Reduction, Regularized, Regularizer

_K_MEANS_ITERATIONS = 10
_NEVER = 2**62  # forwards since the last use of a code that was never used
_LARGEST_SCALE = 10.0  # of the rotation trick: a latent near zero would have the step to itself
_EMPTY = 1e-12  # the average count below which a code has no latents to follow
_CHOICES = {
    "update": ("loss", "ema"),
    "gradient": ("straight_through", "rotation"),
    "distance": ("euclidean", "cosine"),
    "initialisation": ("uniform", "k_means"),
}


class VectorQuantizer(Regularizer):
    """Replaces each latent by its nearest code.

    A *training forward* is one with noise in training mode. Only these change the codebook and its counters, and only
    these communicate. The codebook is the only parameter, as in the published models.

    Args:
        codebook_size: K.
        latent_channels: C.
        weight: weight of the loss.
        reduction: see `Regularizer`.
        commitment_weight: of the term that pulls latents to their codes.
        update: codes are moved by the `loss`, or by moving averages (`ema`).
        ema_decay: d, per training forward.
        gradient: how the decoder's gradient passes the quantisation.
        distance: `euclidean`, or between directions (`cosine`).
        initialisation: `uniform` on [-1/K, 1/K], or on the sphere for the cosine distance; `k_means` places codes in
            clusters of the first training forward, as many as it has latents.
        restart_after: training forwards in a row without a latent after which a code is moved; `None`: never.
        usage_window: training forwards over which `codebook_usage` is counted.
    """

    moments_per_channel = 1
    codebook_size: int

    ema_count: Tensor
    ema_sum: Tensor
    idle: Tensor
    age: Tensor
    initialised: Tensor

    def __init__(
        self,
        codebook_size: int,
        latent_channels: int,
        weight: float = 1.0,
        reduction: Reduction = "mean",
        commitment_weight: float = 0.25,
        update: Literal["loss", "ema"] = "loss",
        ema_decay: float = 0.99,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        distance: Literal["euclidean", "cosine"] = "euclidean",
        initialisation: Literal["uniform", "k_means"] = "uniform",
        restart_after: int | None = None,
        usage_window: int = 100,
    ) -> None:
        super().__init__(weight, reduction)
        counts = {"codebook_size": codebook_size, "latent_channels": latent_channels, "usage_window": usage_window}
        for key, count in (counts | {"restart_after": 1 if restart_after is None else restart_after}).items():
            _require(count >= 1, key, count, "whole numbers from 1")
        _require(commitment_weight >= 0, "commitment_weight", commitment_weight, "numbers from 0")
        _require(0 <= ema_decay < 1, "ema_decay", ema_decay, "numbers from 0 to below 1")
        chosen = {"update": update, "gradient": gradient, "distance": distance, "initialisation": initialisation}
        for key, choice in chosen.items():
            _require(choice in _CHOICES[key], key, choice, " and ".join(_CHOICES[key]))
        self.codebook_size, self.latent_channels = codebook_size, latent_channels
        self.commitment_weight, self.ema_decay = commitment_weight, ema_decay
        self.update, self.gradient, self.distance, self.initialisation = update, gradient, distance, initialisation
        self.restart_after, self.usage_window = restart_after, usage_window
        self._known_initialised = False
        codes = _random_codes(codebook_size, latent_channels, on_sphere=distance == "cosine")
        self.codebook = nn.Parameter(codes, requires_grad=update == "loss")
        # Every code starts with the weight of one latent, at itself.
        self.register_buffer("ema_count", torch.ones(codebook_size))
        self.register_buffer("ema_sum", codes.clone())
        # Training forwards since a code was last taken, and since it was placed.
        self.register_buffer("idle", torch.full((codebook_size,), _NEVER))
        self.register_buffer("age", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("initialised", torch.tensor(initialisation == "uniform"))

    def forward(self, moments: Tensor, noise: Tensor | None) -> Regularized:
        """Quantise.

        Args:
            moments: (B, C, h, w) the encoder's output.
            noise: (B, C, h, w) decides which latents codes are placed at; `None`: the codebook stays as it is.

        Returns:
            Codes as latents, with their indices; the weighted loss of each example; to log `commitment` (mean squared
            distance from latents to codes) and, of training forwards, `codebook_perplexity` (of this batch, over all
            ranks) and `codebook_usage` (share of the codes taken within the last `usage_window` training forwards).
        """
        z = self.mode(moments)  # (B, C, h, w)
        training = self.training and noise is not None
        if training:
            assert noise is not None
            self._place_codes(_rows(z), noise)
        indices = self.indices(z)  # (B, h, w)
        code = self.codes(indices)  # (B, C, h, w)
        distance = (z - code.detach()).square()
        loss = self.commitment_weight * distance
        if self.update == "loss":
            loss = loss + (z.detach() - code).square()
        log = {"commitment": distance.detach().mean()}
        if training:
            log["codebook_perplexity"] = perplexity(self._learn(_rows(z), indices.flatten())).float()
            log["codebook_usage"] = (self.idle < self.usage_window).float().mean()
        path = _rotated(z, code.detach()) if self.gradient == "rotation" else z
        # The decoder reads codes to the last bit; the gradient takes the path.
        quantised = code.detach() + (path - path.detach())
        return Regularized(quantised, self.reduced(loss), self.reduction, log, indices)

    def mode(self, moments: Tensor) -> Tensor:
        """The latents before quantisation, float32, of length 1 for the cosine distance: (B, C, h, w)."""
        if moments.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have {moments.shape[1]} channels; allowed are {self.latent_channels}, those of the codebook; "
                "change `autoencoder.regularizer.latent_channels` to `autoencoder.latent_channels`"
            )
        return self._on_domain(moments.float())

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The latents before quantisation: nothing is drawn."""
        return self.mode(moments)

    def variance(self, moments: Tensor) -> Tensor:
        """Zeros, for nothing is drawn: (B, C, h, w)."""
        return torch.zeros_like(moments, dtype=torch.float32)

    def project(self, z: Tensor) -> Tensor:
        """The code nearest to each latent, as a latent: (B, C, h, w)."""
        return self.codes(self.indices(z))

    def indices(self, z: Tensor) -> Tensor:
        """The code nearest to each latent (B, C, h, w), by number: (B, h, w) int64."""
        flat = nearest_codes(_rows(self.mode(z)), self._on_domain(self.codebook.detach().float()))
        return flat.view(len(z), *z.shape[2:])

    def codes(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) by number to latents (B, C, h, w), with a gradient to the codebook if the loss moves it."""
        return self._on_domain(F.embedding(indices, self.codebook.float()).movedim(-1, 1))

    @torch.no_grad()
    def set_codebook(self, codes: Tensor) -> None:
        """Take a codebook (K, C) from elsewhere, with the state of one that was just initialised."""
        self.codebook.copy_(codes)
        self.ema_sum.copy_(codes)
        self.ema_count.fill_(1.0)
        self.idle.fill_(_NEVER)
        self.age.zero_()
        self.initialised.fill_(True)

    def _on_domain(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) or codes (K, C), of length 1 if only their direction counts."""
        return F.normalize(x, dim=1) if self.distance == "cosine" else x

    @property
    def _is_initialised(self) -> bool:
        # Reading a buffer waits for the GPU: once true, the answer is remembered.
        self._known_initialised = self._known_initialised or bool(self.initialised)
        return self._known_initialised

    @torch.no_grad()
    def _place_codes(self, z: Tensor, noise: Tensor) -> None:
        """Place codes at latents (N, C) of all ranks: all of them at the start, later those that lie idle."""
        first, patience = not self._is_initialised, self.restart_after
        if first:
            waiting = torch.ones(self.codebook_size, dtype=torch.bool, device=z.device)
        elif patience is not None:
            waiting = torch.minimum(self.idle, self.age) >= patience
        else:
            return
        # The channels' sum in float64 has no ties, as one float32 channel has: the choice is the same on any ranks.
        drawn = draw_over_ranks(z, noise.double().sum(dim=1).flatten(), self.codebook_size)
        if first:
            drawn = k_means(z, drawn, _K_MEANS_ITERATIONS, on_sphere=self.distance == "cosine")
            self.initialised.fill_(True)
        # A queue: the i-th code that waits gets the i-th latent drawn, and nobody has to count them on the host.
        position = waiting.cumsum(0) - 1
        self._place(waiting & (position < len(drawn)), drawn[position.clamp(0, len(drawn) - 1)])

    def _place(self, chosen: Tensor, codes: Tensor) -> None:
        """Give the chosen codes, (K,) bool, their rows of `codes` (K, C)."""
        for state in (self.codebook, self.ema_sum):
            state.copy_(torch.where(chosen[:, None], codes, state))
        self.ema_count.masked_fill_(chosen, 1.0)
        # The forward that places a code is not one of its life: the code is taken in it by construction.
        self.age.masked_fill_(chosen, -1)

    @torch.no_grad()
    def _learn(self, z: Tensor, indices: Tensor) -> Tensor:
        """Follow the latents (N, C) and their codes (N,) of all ranks; returns the counts of the codes, (K,) int64."""
        counts = all_reduce_sum(code_counts(indices, self.codebook_size))
        if self.update == "ema":
            sums = all_reduce_sum(code_sums(z, indices, self.codebook_size))
            self.ema_count.lerp_(counts.to(self.ema_count.dtype), 1.0 - self.ema_decay)
            self.ema_sum.lerp_(sums.to(self.ema_sum.dtype), 1.0 - self.ema_decay)
            # A code that nothing takes stays where it is, also when its averages have decayed to nothing.
            followed = self.ema_count[:, None] > _EMPTY
            self.codebook.copy_(torch.where(followed, self.ema_sum / self.ema_count[:, None], self.codebook))
        self.idle.copy_(torch.where((counts > 0) & (self.age >= 0), 0, self.idle + 1))
        self.age += 1
        return counts


def _require(condition: bool, key: str, found: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {found!r}; allowed are {allowed}; change `autoencoder.regularizer.{key}`")


def _random_codes(codebook_size: int, latent_channels: int, on_sphere: bool) -> Tensor:
    """(K, C) codes, uniform on the unit sphere or on [-1/K, 1/K]."""
    # On the sphere their own length is 1 too: the gradient of a direction falls with the length of its vector.
    if on_sphere:
        return F.normalize(torch.randn(codebook_size, latent_channels), dim=1)
    return torch.empty(codebook_size, latent_channels).uniform_(-1 / codebook_size, 1 / codebook_size)


def _rows(z: Tensor) -> Tensor:
    """Latents (B, C, h, w) to (B h w, C)."""
    return z.movedim(1, -1).flatten(0, -2)


def _rotated(z: Tensor, code: Tensor) -> Tensor:
    """`code` as a rotated and scaled z, both (B, C, h, w): rotation and scale are constants for the gradient.

    With unit vectors u of z and v of the code and r that of u + v, the rotation in their plane is two reflections,
    R z = z - 2 r (r . z) + 2 v (u . z) (Fifty et al. 2024).
    """
    with torch.no_grad():
        u, v = F.normalize(z, dim=1), F.normalize(code, dim=1)
        r = F.normalize(u + v, dim=1)
        scale = code.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
        scale = scale.clamp(max=_LARGEST_SCALE)
    rotated = z - 2 * r * (r * z).sum(dim=1, keepdim=True) + 2 * v * (u * z).sum(dim=1, keepdim=True)
    return scale * rotated
