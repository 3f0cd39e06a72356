import csv
import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_train.callbacks import EMACallback, LikelihoodEvaluation
from ldm_train.callbacks.likelihood import MeanBound
from ldm_train.data import ImageTextDataModule
from ldm_train.data.dataset import with_signed_image
from ldm_train.diffusion import Bound, Denoiser, cosine_schedule, variational_bound
from ldm_train.nn import Pixels, UNet
from tests.callbacks.toy import ToyIndex, trainer_of
from tests.data.conftest import sample, write_tar
from tests.stages.toy import batch, latent_diffusion

COUNT = 10
PARTS = ("total", "prior", "steps", "decoder")


class Data(L.LightningDataModule):
    global_batch_size = 4

    def __init__(self, count=COUNT, batch_size=4):
        super().__init__()
        self.train_index, self.val_index = ToyIndex(range(8)), ToyIndex(range(count))
        self.val_batch_size = batch_size

    def train_dataloader(self):
        return DataLoader([0, 4], batch_size=None, collate_fn=lambda first: batch(4, first=first))

    def val_dataloader(self):
        return DataLoader(range(len(self.val_index)), batch_size=self.val_batch_size, collate_fn=some)


def some(ids):
    """Images that are each the same in any batch."""
    parts = [batch(1, first=i) for i in ids]
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("image", "sample_id", "position")}
    return {**joined, "epoch": 0, **{key: [part[key][0] for part in parts] for key in ("caption", "key")}}


def of_pixels():
    torch.manual_seed(1)
    unet = UNet(3, 3, 16, (1, 2), 1, (2,), context_dim=16, num_heads=2, norm_groups=8)
    return latent_diffusion(autoencoder=Pixels(), denoiser=Denoiser(unet, cosine_schedule(20), "v"))


def directly(stage, count, decoder, **options):
    given, stage = some(range(count)), stage.eval()
    return variational_bound(
        stage.denoiser, stage.latents(given), stage.condition(given), stage.keys(given), decoder, **options
    )


def validated(tmp_path, stage, data, *others, **options):
    evaluation = LikelihoodEvaluation(str(tmp_path), **options)
    trainer = trainer_of(tmp_path, [*others, evaluation])
    trainer.validate(stage, data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("batch_size", [3, 10])
@pytest.mark.parametrize("num_images", [None, 7])
def test_latent_models_log_the_mean_bound_of_the_first_images_however_batched(tmp_path, batch_size, num_images):
    stage = latent_diffusion()
    metrics = validated(tmp_path, stage, Data(batch_size=batch_size), num_images=num_images, num_times=5)
    expected = directly(stage, num_images or COUNT, "gaussian", num_times=5)
    for part in PARTS:
        key = "val/latent_bound" + ("" if part == "total" else f"_{part}")
        assert metrics[key] == pytest.approx(float(getattr(expected, part).mean()), rel=1e-5)
    assert "val/bits_per_dim" not in metrics


def test_models_of_pixels_log_bits_per_dimension(tmp_path):
    stage = of_pixels()
    metrics = validated(tmp_path, stage, Data(), num_times=None)
    expected = directly(stage, COUNT, "discrete", clip_x_0=1.0)
    assert metrics["val/bits_per_dim"] == pytest.approx(float(expected.total.mean()), rel=1e-5)
    parts = sum(metrics[f"val/bits_per_dim_{part}"] for part in PARTS[1:])
    assert metrics["val/bits_per_dim"] == pytest.approx(parts, rel=1e-5)
    assert "val/latent_bound" not in metrics


def test_images_of_shards_are_judged_as_numbers_and_not_as_bytes(tmp_path):
    members = [member for number in range(12) for member in sample(number)]
    data = ImageTextDataModule(
        str(write_tar(tmp_path / "a.tar", members)), 8, 4, seed=0, val_fraction=0.5, val_batch_size=12
    )
    stage = of_pixels()
    metrics = validated(tmp_path, stage, data, num_times=None)
    (given,) = [with_signed_image(batch) for batch in data.val_dataloader()]
    expected = variational_bound(
        stage.denoiser,
        given["image"],
        stage.condition(given),
        stage.keys(given),
        "discrete",
        clip_x_0=1.0,
    )
    assert len(given["image"]) > 1
    assert metrics["val/bits_per_dim"] == pytest.approx(float(expected.total.mean()), rel=1e-5)


def test_the_curve_holds_the_mean_term_of_each_time_that_was_looked_at(tmp_path):
    stage = of_pixels()
    validated(tmp_path, stage, Data(), num_times=None)
    expected = directly(stage, COUNT, "discrete", clip_x_0=1.0).terms.mean(0)
    with (tmp_path / "likelihood" / "step_0000000.csv").open() as file:
        rows = [(int(row["t"]), float(row["bits_per_dim"])) for row in csv.DictReader(file)]
    assert [t for t, _ in rows] == list(range(1, 20))
    torch.testing.assert_close(torch.tensor([value for _, value in rows]), expected.float(), rtol=1e-4, atol=1e-6)


def test_a_finished_fit_and_its_checkpoint_are_judged_alike_by_the_averages(tmp_path):
    """The raw weights go on as they were; the step of the judgement is that of the checkpoint."""
    stage, data = of_pixels(), Data()
    ema = EMACallback(decay=0.5)
    fit = trainer_of(tmp_path, [ema, LikelihoodEvaluation(str(tmp_path / "fit"), num_times=3)], max_steps=3)
    fit.fit(stage, data)
    raw = {name: value.clone() for name, value in stage.state_dict().items()}
    fit.save_checkpoint(tmp_path / "last.ckpt")

    again = of_pixels()
    evaluation = LikelihoodEvaluation(str(tmp_path / "validate"), num_times=3)
    trainer = trainer_of(tmp_path, [EMACallback(decay=0.5), evaluation])
    trainer.validate(again, data, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    found = [float(t.callback_metrics["val/bits_per_dim"]) for t in (fit, trainer)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    files = [tmp_path / kind / "likelihood" / "step_0000003.csv" for kind in ("fit", "validate")]
    assert files[0].read_text() == files[1].read_text()

    unaveraged = float(directly(stage, COUNT, "discrete", clip_x_0=1.0, num_times=3).total.mean())
    assert abs(found[0] - unaveraged) > 1e-4
    assert all(torch.equal(value, raw[name]) for name, value in stage.state_dict().items())


def test_a_limited_validation_limits_the_images(tmp_path):
    evaluation, stage = LikelihoodEvaluation(str(tmp_path), num_times=3), of_pixels()
    trainer = trainer_of(tmp_path, [evaluation], limit_val_batches=1)
    trainer.validate(stage, Data(), verbose=False)
    expected = directly(stage, 4, "discrete", clip_x_0=1.0, num_times=3)
    assert float(trainer.callback_metrics["val/bits_per_dim"]) == pytest.approx(float(expected.total.mean()), rel=1e-5)


def test_the_mean_of_two_halves_is_the_mean_of_the_whole():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    whole = Bound(*(random(8) for _ in range(4)), torch.randint(1, 6, (8, 3), generator=generator), random(8, 3))
    taken = torch.tensor([True] * 7 + [False])
    together, first, second = MeanBound(6), MeanBound(6), MeanBound(6)
    together.update(whole, taken)
    for half, rows in ((first, slice(0, 3)), (second, slice(3, 8))):
        half.update(Bound(*(part[rows] for part in whole)), taken[rows])
    for name in ("parts", "count", "terms", "term_counts"):
        setattr(first, name, getattr(first, name) + getattr(second, name))
    parts, terms = together.compute()
    torch.testing.assert_close(first.compute()[0], parts)
    torch.testing.assert_close(first.compute()[1], terms, equal_nan=True)
    assert float(parts["total"]) == pytest.approx(float(whole.total[:7].mean()))
    assert math.isnan(float(terms[0]))


@pytest.mark.parametrize("arguments", [{"num_images": 0}, {"num_times": 0}])
def test_numbers_that_are_not_positive_are_refused(arguments):
    with pytest.raises(
        ValueError, match=rf"is 0; allowed are .* change `callbacks\.likelihood\.{next(iter(arguments))}`"
    ):
        LikelihoodEvaluation("runs", **arguments)


def test_what_would_fail_after_training_is_refused_before(tmp_path):
    for data, num_times, key in (
        (Data(0), 3, r"data\.val_fraction"),
        (Data(), 20, r"callbacks\.likelihood\.num_times"),
    ):
        trainer = trainer_of(tmp_path, [LikelihoodEvaluation(str(tmp_path), num_times=num_times)])
        with pytest.raises(ValueError, match=rf"allowed are .* change `{key}`"):
            trainer.fit(of_pixels(), data)
        assert trainer.global_step == 0
