"""Calibration: measure mean and standard deviation of the latents, so that stage 2 can normalise them.

Over N images, from the posterior's moments (see `ldm_train.metrics.latents`), so the result is what draws from the
posterior have, without drawing; summed over all ranks, and of the averaged weights if there are any.
"""

import lightning as L

from ldm_train.callbacks.ema import evaluation_weights
from ldm_train.callbacks.preemption import interruptible
from ldm_train.data import ImageTextDataModule
from ldm_train.distributed import global_rank, world_size
from ldm_train.metrics import LatentStatistics
from ldm_train.stages import AutoencoderStage


class LatentCalibration(L.Callback):
    """Calibrates the autoencoder when training ends, before the last checkpoint is written.

    Args:
        num_images: images measured, a fixed choice from the training split; `None` takes all.
        batch_size: images encoded at a time.
    """

    def __init__(self, num_images: int | None = None, batch_size: int = 64) -> None:
        for key, value in {"num_images": num_images, "batch_size": batch_size}.items():
            if value is not None and value < 1:
                raise ValueError(
                    f"{key} is {value}; allowed are whole numbers from 1; change `callbacks.calibration.{key}`"
                )
        self.num_images = num_images
        self.batch_size = batch_size

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Statistics of weights that are about to change are no statistics: a longer run measures again at its end."""
        assert isinstance(pl_module, AutoencoderStage)
        if pl_module.trains == "all":
            pl_module.autoencoder.forget_calibration()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and set the statistics, unless they are known and the encoder has not changed."""
        assert isinstance(pl_module, AutoencoderStage)
        if pl_module.autoencoder.is_calibrated:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageTextDataModule)
        statistics = LatentStatistics(pl_module.autoencoder.latent_channels, with_divergence=False)
        statistics.to(pl_module.device)
        batches = data.reference_batches(self.num_images, self.batch_size)
        with evaluation_weights(trainer, pl_module):
            for i, batch in enumerate(interruptible(trainer, batches)):
                if i % world_size() == global_rank():
                    statistics.update(*pl_module.latent_moments(batch["image"].to(pl_module.device)))
        mean, std, _ = statistics.compute()
        pl_module.autoencoder.calibrate(mean.float().reshape(-1), std.float().reshape(-1))
