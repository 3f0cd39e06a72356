"""Calibration: measure mean and standard deviation of the latents, so that stage 2 can normalise them.

Over N images, with the posterior's mean m and variance v of each latent value (law of total variance),

    latent_mean = E[m],    latent_std^2 = E[v] + E[m^2] - E[m]^2            per channel,

which is what draws from the posterior have, without drawing. Sums are float64 and taken over all ranks.
"""

import lightning as L
import torch
from torch import Tensor

from ldm_train.data import ImageTextDataModule
from ldm_train.distributed import all_reduce_sum, global_rank, world_size
from ldm_train.stages import AutoencoderStage


class LatentCalibration(L.Callback):
    """Calibrates the autoencoder when training ends, before the last checkpoint is written.

    Args:
        num_images: images measured, a fixed choice from the training split; `None` takes all.
        batch_size: images encoded at a time.
    """

    def __init__(self, num_images: int | None = None, batch_size: int = 64) -> None:
        self.num_images = num_images
        self.batch_size = batch_size

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Statistics of weights that are about to change are no statistics: a longer run measures again at its end."""
        assert isinstance(pl_module, AutoencoderStage)
        pl_module.autoencoder.forget_calibration()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and set the statistics."""
        assert isinstance(pl_module, AutoencoderStage)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageTextDataModule)
        channels = pl_module.autoencoder.latent_channels
        sums = torch.zeros(3, channels, dtype=torch.float64, device=pl_module.device)
        count = torch.zeros((), dtype=torch.float64, device=pl_module.device)
        for i, batch in enumerate(data.reference_batches(self.num_images, self.batch_size)):
            if i % world_size() == global_rank():
                moments = latent_sums(pl_module, batch["image"].to(pl_module.device))
                sums += moments[0]
                count += moments[1]
        total, number = all_reduce_sum(sums), all_reduce_sum(count)
        mean, second, variance = total / number
        std = (variance + second - mean**2).clamp(min=0).sqrt()
        pl_module.autoencoder.calibrate(mean.float(), std.float())


def latent_sums(stage: AutoencoderStage, image: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a batch and its positions, per channel: (3, C) of m, m^2 and v, and the number of values in each."""
    mean, variance = (moment.double() for moment in stage.latent_moments(image))
    sums = torch.stack([value.sum(dim=(0, 2, 3)) for value in (mean, mean**2, variance)])
    return sums, torch.tensor(mean[:, 0].numel(), dtype=torch.float64, device=sums.device)
