"""The smallest stage and data that have the API of the real ones: a pixel-wise colour and its caption."""

from contextlib import contextmanager
from types import SimpleNamespace

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm_train.conditioning import NoConditioner
from ldm_train.nn import Pixels

NUM_IMAGES = 24


def batch_of(indices):
    """Images of one colour each, named by it."""
    ids = torch.tensor(list(indices))
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(NUM_IMAGES, 3, generator=generator)[ids] * 2 - 1
    return {
        "image": colours[:, :, None, None].expand(-1, -1, 8, 8).contiguous(),
        "caption": [f"colour {i}" for i in ids.tolist()],
        "sample_id": ids,
        "position": ids,
        "epoch": 0,
        "key": [f"00000/{i:04d}" for i in ids.tolist()],
    }


class ToyIndex(list):
    fingerprint = "toy"


class ToyData(L.LightningDataModule):
    options = SimpleNamespace(interpolation="bicubic")

    global_batch_size = 4

    def __init__(self):
        super().__init__()
        self.train_index = ToyIndex(range(NUM_IMAGES))

    def _loader(self):
        return DataLoader(range(NUM_IMAGES), batch_size=4, collate_fn=batch_of)

    def train_dataloader(self):
        return self._loader()

    def val_dataloader(self):
        return self._loader()

    def reference_batches(self, count, batch_size, data_set=None):
        rows = range(NUM_IMAGES if count is None else count)
        for first in range(0, len(rows), batch_size):
            yield batch_of(rows[first : first + batch_size])

    def summary(self):
        return {"training images": NUM_IMAGES}


class ToyStage(L.LightningModule):
    """Learns a colour for each caption; `generate` shows it with the seed's noise."""

    def __init__(self, learning_rate=0.5):
        super().__init__()
        self.colours = nn.Embedding(NUM_IMAGES, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        nn.init.zeros_(self.colours.weight)
        self.learning_rate = learning_rate
        self.conditioner, self.autoencoder = NoConditioner(), Pixels()
        self.seen = []
        self.scale = 1.0

    def training_step(self, batch, batch_idx):
        target = batch["image"].mean(dim=(2, 3))
        loss = (self.colours(batch["sample_id"]) - target).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.colours.weight.detach().clone())
        self.log("val/loss", (self.colours(batch["sample_id"]) - batch["image"].mean(dim=(2, 3))).square().mean())
        return self.reconstruct(batch["image"])

    def generate(self, batch, seeds):
        assert not self.training
        self.seen.append(self.colours.weight.detach().clone())
        colours = self.scale * self.colours(seeds)[:, :, None, None]
        return colours.expand_as(batch["image"]).clamp(-1, 1)

    def reconstruct(self, image):
        return image.flip(-1) * 0.5

    @contextmanager
    def adapters_disabled(self):
        self.scale = 0.0
        yield
        self.scale = 1.0

    def parts(self):
        return {"colours": self.colours, "frozen": self.frozen}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([self.colours.weight], lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer_of(tmp_path, callbacks, **options):
    """A silent trainer on the CPU."""
    defaults = {
        "max_steps": 6,
        "logger": False,
        "accelerator": "cpu",
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": any(hasattr(c, "has_dataloader_changed") for c in callbacks),
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(callbacks=callbacks, **{**defaults, **options})
