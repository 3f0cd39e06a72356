"""Watches the figures of an autoencoder's training and says what is going wrong while it can still be mended.

Four things ruin a first stage slowly, with a loss that looks well:

- the discriminator wins: real and reconstructed images differ by a wide gap of logits, and its gradient says no more;
- the adaptive weight of the generator's loss (Esser et al. 2021, eq. 7) stands at its cap, because what the
  discriminator sends to the decoder's last layer has vanished;
- the codebook collapses to a few codes;
- the latents collapse or grow, against any bound or against their own standard deviation of earlier.

The figures are read on the steps that Lightning logs, where it waits for the device anyway. An alarm is raised when a
condition held on several such steps in a row, and repeated only after a long while. A run keeps its recipe, so what an
alarm advises is for a new one (`run_id=...`); `stage.autoencoder.checkpoint` begins it with the weights of the old one.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

_log = logging.getLogger(__name__)
_FIGURES = ("logits_real", "logits_fake", "adaptive_weight", "codebook_usage", "latent_std")


class AutoencoderHealth(L.Callback):
    """Warns, on rank 0, with the figure, its likely cause and the config key to change.

    Args:
        warmup_steps: optimizer steps before anything is judged.
        patience: logged steps in a row on which a condition must hold.
        repeat_after: logged steps between two warnings of one kind.
        max_logit_gap: largest mean logit of real images above that of reconstructions.
        min_codebook_usage: least share of the codes in use.
        latent_std_range: lowest and highest standard deviation of the latents, over all channels.
        max_latent_std_drift: largest factor, up or down, by which that deviation may leave its value after the warm-up.

    Raises:
        ValueError: if an argument makes no sense.
    """

    def __init__(
        self,
        warmup_steps: int = 1000,
        patience: int = 5,
        repeat_after: int = 100,
        max_logit_gap: float = 3.0,
        min_codebook_usage: float = 0.25,
        latent_std_range: Sequence[float] = (0.05, 50.0),
        max_latent_std_drift: float = 3.0,
    ) -> None:
        _check(warmup_steps, patience, repeat_after, latent_std_range, max_latent_std_drift, max_logit_gap)
        self.warmup_steps, self.patience, self.repeat_after = warmup_steps, patience, repeat_after
        self.max_logit_gap, self.min_codebook_usage = max_logit_gap, min_codebook_usage
        self.latent_std_range, self.max_latent_std_drift = tuple(latent_std_range), max_latent_std_drift
        self.first_latent_std: float | None = None
        self._streaks: dict[str, int] = {}  # kind -> logged steps in a row on which its condition held
        self._pauses: dict[str, int] = {}  # kind -> logged steps until it may be warned of again
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run has made its first steps already."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Reads the figures and judges them at the end of a logged step, once however many batches it accumulates."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped, self._last_step = step != self._last_step, step
        logged = stepped and every > 0 and step % every == 0
        if logged and step > self.warmup_steps and trainer.is_global_zero:
            self.judge(step, _figures(trainer.callback_metrics), _cap(pl_module))

    def judge(self, step: int, figures: Mapping[str, float], cap: float | None) -> None:
        """Warns of every condition that has held for long enough.

        Args:
            step: the optimizer step.
            figures: the figures of the step, by the names under `train/`; some may be missing.
            cap: the largest adaptive weight there can be; `None` without a discriminator.
        """
        complaints = {
            **self._about_discriminator(figures, cap),
            **self._about_codebook(figures),
            **self._about_latents(figures),
        }
        self._pauses = {kind: left - 1 for kind, left in self._pauses.items() if left > 1}
        self._streaks = {kind: self._streaks.get(kind, 0) + 1 for kind in complaints}
        for kind, message in complaints.items():
            if self._streaks[kind] >= self.patience and kind not in self._pauses:
                _log.warning("step %d: %s (in a new run, `run_id=...`)", step, message)
                self._pauses[kind] = self.repeat_after

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must not begin anew: the deviation to compare with, and how long things have lasted."""
        return {
            "first_latent_std": self.first_latent_std,
            "streaks": dict(self._streaks),
            "pauses": dict(self._pauses),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.first_latent_std = state_dict["first_latent_std"]
        self._streaks, self._pauses = dict(state_dict["streaks"]), dict(state_dict["pauses"])

    def _about_discriminator(self, figures: Mapping[str, float], cap: float | None) -> dict[str, str]:
        complaints = {}
        if {"logits_real", "logits_fake"} <= figures.keys():
            gap = figures["logits_real"] - figures["logits_fake"]
            if gap > self.max_logit_gap:
                complaints["logit_gap"] = (
                    f"the discriminator's logits of real images exceed those of reconstructions by {gap:.3g}, more "
                    f"than {self.max_logit_gap:g}: it wins, and its gradient teaches the decoder nothing any more; "
                    "raise `adversarial.r1_weight` or `adversarial.lecam_weight`, lower `stage.discriminator_lr`, or "
                    "start it later with `adversarial.start`"
                )
        if cap is not None and figures.get("adaptive_weight", 0.0) >= cap * (1 - 1e-6):  # as float32
            complaints["adaptive_weight"] = (
                f"train/adaptive_weight is {figures['adaptive_weight']:.3g}, its cap: next to nothing of the "
                "discriminator's gradient reaches the decoder's last layer, because the discriminator is saturated or "
                "has not learnt yet; give it time before it reaches the generator with `adversarial.warmup`, "
                "regularize it with `adversarial.r1_weight`, or lower `adversarial.max_adaptive_weight`"
            )
        return complaints

    def _about_codebook(self, figures: Mapping[str, float]) -> dict[str, str]:
        usage = figures.get("codebook_usage", 1.0)
        if not usage < self.min_codebook_usage:
            return {}
        return {
            "codebook_usage": (
                f"train/codebook_usage is {usage:.3g}, below {self.min_codebook_usage:g}: the codebook collapses to a "
                "few codes; restart idle codes with `autoencoder.regularizer.restart_after`, begin with "
                "`autoencoder.regularizer.initialisation=k_means`, or lower `autoencoder.regularizer.codebook_size`"
            )
        }

    def _about_latents(self, figures: Mapping[str, float]) -> dict[str, str]:
        std = figures.get("latent_std")
        if std is None:
            return {}
        if self.first_latent_std is None and 0 < std < float("inf"):
            self.first_latent_std = std
        complaints = {}
        lowest, highest = self.latent_std_range
        if std < lowest:
            complaints["latent_std_range"] = (
                f"train/latent_std is {std:.3g}, below {lowest:g}: the latents collapse; lower "
                "`autoencoder.regularizer.weight`"
            )
        elif std > highest:
            complaints["latent_std_range"] = (
                f"train/latent_std is {std:.3g}, above {highest:g}: the latents grow without bound; raise "
                "`autoencoder.regularizer.weight` or lower `optimizer.lr`"
            )
        first, drift = self.first_latent_std, self.max_latent_std_drift
        if first is not None and not first / drift <= std <= first * drift:
            complaints["latent_std_drift"] = (
                f"train/latent_std is {std:.3g}, {std / first:.3g} times the {first:.3g} that it was after "
                f"{self.warmup_steps} steps: the latents do not come to rest, and what is measured of them today is "
                "wrong tomorrow; change `autoencoder.regularizer.weight` (higher against growth, lower against "
                "shrinking), or lower `optimizer.lr`"
            )
        return complaints


def _figures(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The figures there are, by their names without `train/`; one wait for the device for all of them."""
    found = {name: metrics[f"train/{name}"] for name in _FIGURES if f"train/{name}" in metrics}
    if not found:
        return {}
    values = torch.stack([value.detach().float().reshape(()) for value in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


def _cap(pl_module: L.LightningModule) -> float | None:
    adversarial = getattr(pl_module.loss, "adversarial", None)
    return None if adversarial is None else float(adversarial.max_adaptive_weight)


def _check(
    warmup_steps: int, patience: int, repeat_after: int, latent_std_range: Sequence[float], drift: float, gap: float
) -> None:
    for key, value, least in (
        ("warmup_steps", warmup_steps, 0),
        ("patience", patience, 1),
        ("repeat_after", repeat_after, 1),
        ("max_latent_std_drift", drift, 1.0),
        ("max_logit_gap", gap, 0.0),
    ):
        if value < least:
            raise ValueError(f"{key} is {value}; allowed are numbers from {least}; change `callbacks.health.{key}`")
    if len(latent_std_range) != 2 or not 0 <= latent_std_range[0] < latent_std_range[1]:
        raise ValueError(
            f"latent_std_range is {list(latent_std_range)}; allowed is a lower and a higher number from 0; change "
            "`callbacks.health.latent_std_range`"
        )
