"""The Frechet distance between validation images and their reconstructions, the rFID of the autoencoder's literature.

Published figures (Rombach et al. 2022, table 8) are Inception distances over the 50,000 validation images of ImageNet
at 256 pixels. The distance depends on the images and on their number, so figures of different validation sets cannot be
compared, and one of few images is only a curve to watch.
"""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.distributed import all_reduce_sum
from ldm_train.metrics import FeatureExtractor, FrechetDistance

_log = logging.getLogger(__name__)


class ReconstructionFrechet(L.Callback):
    """Logs `val/rfid` for Inception features, `val/rfid_<extractor>` for others, after every validation.

    The reconstructions are those that `validation_step` returns, so nothing is decoded a second time; the images'
    own statistics are measured in the first validation and kept. Two images are needed, over all ranks.

    Args:
        extractor: the feature space.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.distance = FrechetDistance(extractor)
        self.key = "val/rfid" if extractor.name == "inception" else f"val/rfid_{extractor.name}"

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins a new set of reconstructions, and of images if their statistics are not known yet."""
        self.distance.to(pl_module.device)
        self.distance.reset()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: ImageTextBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch (B, 3, H, W) and its reconstructions."""
        if trainer.sanity_checking:  # a few batches of the set: no statistics to keep
            return
        assert isinstance(outputs, Tensor)
        if self.distance.reference is None:
            self.distance.update(batch["image"], real=True)
        self.distance.update(outputs, real=False)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures and logs; every rank takes part."""
        if trainer.sanity_checking:
            return
        count = int(all_reduce_sum(self.distance.fake_count))
        if count < 2:
            if trainer.is_global_zero:
                _log.warning(
                    "%s is left out: found %d validation images; allowed are 2 or more; change `data.val_fraction`, "
                    "`data.val_shards` or `trainer.limit_val_batches`",
                    *(self.key, count),
                )
            return
        if self.distance.reference is None:
            self.distance.keep_reference()
        # The figure is that of all ranks already; their mean is the same, and saying so spares Lightning's warning.
        pl_module.log(self.key, self.distance.compute().float(), sync_dist=True)
