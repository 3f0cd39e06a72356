"""Judges a text-to-image stage by what it generates: Frechet distance, caption retrieval, and a sheet to look at.

For the first N training captions in a fixed order, one image each is generated with the sample id as its seed. So two
evaluations differ by the weights alone, and neither the number of ranks nor the batch size matters: rank r of R makes
the images i = r (mod R). One set of images serves all three purposes.

The training captions are taken because a caption has one reference image there, and because the question is first
whether a model learns; a validation split can be small or lack whole subjects on purpose.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import move_data_to_device
from PIL import Image
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.callbacks.drawing import Tile, blocks_of_rows, captioned_grid, labelled_rows
from ldm_train.callbacks.ema import evaluation_weights
from ldm_train.callbacks.preemption import interruptible
from ldm_train.callbacks.progress import subtask
from ldm_train.callbacks.tracking import log_metrics, save_picture
from ldm_train.distributed import all_reduce_sum, global_rank, world_size
from ldm_train.metrics import (
    CaptionRetrieval,
    FeatureExtractor,
    FrechetDistance,
    fid_key,
    load_statistics,
    save_statistics,
    to_uint8,
)


class SampleEvaluation(L.Callback):
    """Evaluates before the first step, every `every_n_steps`, after the last step, and in `task=validate`.

    Logs `val/fid_<extractor>` (`val/fid` for Inception), `val/retrieval_at_1` and `val/retrieval_times_chance`; writes
    `samples/step_<step>.png`. Averaged weights are used if there are any.

    Args:
        run_dir: the run's directory.
        extractor: the feature space of both figures.
        num_images: images to generate; a Frechet distance depends on it, so keep it fixed.
        batch_size: images generated at a time on each rank; `trainer.limit_val_batches` limits their number.
        every_n_steps: optimizer steps between two evaluations; null for the first and the last alone.
        num_real: real images to compare with; null for all training images.
        num_pairs: how many of the images enter the retrieval and the sheet.
        reference_statistics: a file that keeps the real images' statistics between runs; made if it is absent.
    """

    def __init__(
        self,
        run_dir: str,
        extractor: FeatureExtractor,
        num_images: int = 512,
        batch_size: int = 64,
        every_n_steps: int | None = None,
        num_real: int | None = None,
        num_pairs: int = 64,
        reference_statistics: str | None = None,
    ) -> None:
        if num_images < max(2, num_pairs) or batch_size < 2:
            raise ValueError(
                f"found num_images={num_images}, num_pairs={num_pairs}, batch_size={batch_size}; allowed are "
                "num_images >= max(2, num_pairs) and batch_size >= 2: change `callbacks.samples.num_images`, "
                "`callbacks.samples.num_pairs` or `callbacks.samples.batch_size`."
            )
        self.directory = Path(run_dir) / "samples"
        self.num_images, self.num_real, self.num_pairs = num_images, num_real, num_pairs
        self.batch_size, self.every_n_steps = batch_size, every_n_steps
        self.reference_statistics = reference_statistics
        self.distance = FrechetDistance(extractor)
        self.retrieval = CaptionRetrieval(extractor)
        self._evaluated_step = -1
        self._loaded_step = 0
        self._broken_off: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The untrained model's figures, to compare with; in a resumed run those that the last start broke off."""
        step = trainer.global_step
        if step == 0 or self._broken_off == step:
            self.evaluate(trainer, pl_module, step)
        self._evaluated_step = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: ImageTextBatch, batch_idx: int
    ) -> None:
        """Every `every_n_steps` optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._evaluated_step:
            self.evaluate(trainer, pl_module, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The trained model's figures, unless the last step has been evaluated already."""
        if trainer.global_step != self._evaluated_step:
            self.evaluate(trainer, pl_module, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """In `task=validate`; the step is the checkpoint's."""
        if trainer.state.fn == "validate":
            self.evaluate(trainer, pl_module, self._loaded_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tells the step whose evaluation is not done, if the run is left in the midst of it."""
        checkpoint["evaluation_broken_off"] = self._broken_off

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning restores the step of a run that is continued, not of one that is judged."""
        self._loaded_step = checkpoint["global_step"]
        self._broken_off = checkpoint.get("evaluation_broken_off")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Generates, measures, logs and draws; every rank must call it."""
        self._evaluated_step = self._broken_off = step
        for metric in (self.distance, self.retrieval):
            metric.to(pl_module.device)
            metric.reset()
        self._prepare_reference(trainer, pl_module)
        sheet = self._generate(trainer, pl_module)
        retrieval = self.retrieval.compute()
        metrics = {fid_key(self.distance.extractor): self.distance.compute()}
        metrics |= {f"val/{name}": value for name, value in retrieval.items()}
        log_metrics(trainer, metrics, step)
        shown = ", ".join(f"{key.removeprefix('val/')} {value:.3g}" for key, value in metrics.items())
        if trainer.is_global_zero:
            save_picture(trainer, sheet.drawn(f"Step {step}. {shown}"), self.path(step), "val/samples", step)
            print(f"step {step}: {shown}; {self.path(step)}", flush=True)
        self._broken_off = None

    def path(self, step: int) -> Path:
        """The sheet of a step."""
        return self.directory / f"step_{step:07d}.png"

    def _generate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> "_Sheet":
        """Feeds both metrics with this rank's images and returns the sheet of all ranks."""
        sheet = _Sheet()
        count = self._count(trainer)
        with evaluation_weights(trainer, pl_module), subtask(trainer, "images generated", count) as advance:
            for rows, whole in interruptible(trainer, _batches_of_rank(trainer, count, self.batch_size)):
                own = _select(whole, rows)
                images = torch.zeros(whole["image"].shape, dtype=torch.uint8, device=pl_module.device)
                if rows:
                    images[rows] = generated(trainer, pl_module, own)
                    self.distance.update(images[rows], real=False)
                paired = [row for row in rows if len(sheet) + row < self.num_pairs]
                if paired:
                    self.retrieval.update(images[paired], whole["image"][paired].to(pl_module.device))
                shown = list(range(len(images)))[: self.num_pairs - len(sheet)]
                if shown:
                    # Each image was made by one rank, the others hold zeros in its place: the sum is all of them.
                    sheet.add(pl_module, _select(whole, shown), all_reduce_sum(images[shown]).cpu())
                advance(len(whole["caption"]))
        return sheet

    def _count(self, trainer: L.Trainer) -> int:
        """Images to generate: no more than a limited validation sees; a limit of 0 only switches its loop off."""
        limit = trainer.limit_val_batches
        return min(self.num_images, limit * self.batch_size) if isinstance(limit, int) and limit else self.num_images

    def _prepare_reference(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sums the real images once a run, or takes their statistics from the file of an earlier one."""
        if self.distance.reference is not None:
            return
        index = trainer.datamodule.train_index  # type: ignore[attr-defined]
        count = len(index) if self.num_real is None else min(self.num_real, len(index))
        path = None if self.reference_statistics is None else Path(self.reference_statistics)
        identity = {} if path is None else self._identity(trainer, count)
        if path is not None and path.is_file():
            self.distance.set_reference(load_statistics(path, identity))
            return
        with subtask(trainer, "real images measured", count) as advance:
            for rows, whole in interruptible(trainer, _batches_of_rank(trainer, count, self.batch_size)):
                self.distance.update(whole["image"][rows].to(pl_module.device), real=True)
                advance(len(whole["caption"]))
        statistics = self.distance.keep_reference()
        if path is not None and trainer.is_global_zero:
            save_statistics(path, statistics, identity)

    def _identity(self, trainer: L.Trainer, count: int) -> dict[str, str]:
        """Which images the statistics are of, and in which features."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        height, width = next(iter(data.reference_batches(1, 1)))["image"].shape[-2:]
        return {
            "extractor": self.distance.extractor.fingerprint,
            "data": data.train_index.fingerprint,
            "images": f"{count} of {height} x {width}, {data.options.interpolation}",
        }


class _Sheet:
    """Generated images with their captions; beside the images they were made from, if these are their conditions."""

    def __init__(self) -> None:
        self.images: dict[str, list[Tensor]] = {"condition": [], "generated": [], "image": []}
        self.captions: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def add(self, pl_module: L.LightningModule, batch: ImageTextBatch, images: Tensor) -> None:
        """A batch and what was generated for it, (B, 3, H, W) bytes on the host."""
        batch = move_data_to_device(batch, pl_module.device)
        shown = pl_module.conditioner.show(batch, pl_module.autoencoder)  # type: ignore[union-attr, operator]
        if shown is not None:
            self.images["condition"] += to_uint8(shown).cpu()
            self.images["image"] += to_uint8(batch["image"]).cpu()
        self.images["generated"] += images
        self.captions += pl_module.conditioner.describe(batch)  # type: ignore[union-attr, operator]

    def drawn(self, title: str) -> Image.Image:
        """The sheet under a title."""
        title = f"{title}, {len(self)} images generated from their conditions"
        if not self.images["condition"]:
            tiles = [Tile(image, text) for image, text in zip(self.images["generated"], self.captions, strict=True)]
            return captioned_grid(tiles, title)
        kinds = {kind: torch.stack(images) for kind, images in self.images.items()}
        return labelled_rows(*blocks_of_rows(kinds), title)


def generated(trainer: L.Trainer, pl_module: L.LightningModule, batch: ImageTextBatch) -> Tensor:
    """One image per caption, seeded by its sample id, as bytes (B, 3, H, W) on the module's device."""
    batch = move_data_to_device(batch, pl_module.device)
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return to_uint8(pl_module.generate(batch, batch["sample_id"]))  # type: ignore[operator]


def _batches_of_rank(trainer: L.Trainer, count: int, batch_size: int) -> Iterator[tuple[list[int], ImageTextBatch]]:
    """The first `count` reference samples in batches of all ranks, with the rows of each that are this rank's."""
    first = 0
    for whole in trainer.datamodule.reference_batches(count, batch_size * world_size()):  # type: ignore[attr-defined]
        size = len(whole["caption"])
        yield [row for row in range(size) if (first + row) % world_size() == global_rank()], whole
        first += size


def _select(batch: ImageTextBatch, rows: Sequence[int]) -> ImageTextBatch:
    """A batch of some of a batch's samples."""

    def of(entry: object) -> object:
        if isinstance(entry, Tensor):
            return entry[list(rows)]
        return [entry[row] for row in rows] if isinstance(entry, list) else entry

    return cast(ImageTextBatch, {name: of(entry) for name, entry in batch.items()})
