from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_train.nn import Clock

from .toy import adversarial, autoencoder_stage, batch, quantizer

STEPS, ACCUMULATED = 3, 2


@pytest.fixture
def stage(monkeypatch):
    return quiet(autoencoder_stage(), monkeypatch)


def quiet(stage, monkeypatch):
    monkeypatch.setattr(stage, "log", lambda *_, **__: None)
    monkeypatch.setattr(stage, "log_dict", lambda *_, **__: None)
    return stage


def fit(stage, **options):
    """Optimizer steps of two batches each, without anything but training."""
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=ACCUMULATED, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        **options,
    )  # fmt: skip
    trainer.fit(stage, DataLoader(range(STEPS * ACCUMULATED), batch_size=None, collate_fn=lambda i: batch(first=4 * i)))
    return stage


def test_the_loss_of_a_batch_is_the_mean_over_its_samples_whatever_their_company(stage):
    """So 1 process and many, with the same global batch, have the same loss."""
    whole = stage.training_step(batch(4), 0)
    halves = [stage.training_step({k: v[s] if k != "epoch" else v for k, v in batch(4).items()}, 0)
              for s in (slice(2), slice(2, 4))]  # fmt: skip
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-5, atol=1e-5)


def test_latents_are_drawn_anew_each_epoch(stage):
    with torch.no_grad():
        stage.autoencoder.to_moments.bias[4:] += 3.0  # a wide posterior
    assert stage.training_step(batch(epoch=0), 0) != stage.training_step(batch(epoch=1), 0)
    assert stage.training_step(batch(epoch=1), 0) == stage.training_step(batch(epoch=1), 0)


def test_validation_returns_images_and_has_no_chance_in_it(stage):
    first, second = stage.validation_step(batch(), 0), stage.validation_step(batch(), 0)
    assert torch.equal(first, second)
    assert first.abs().max() <= 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("start", [0, 1])
def test_one_optimizer_over_two_groups_is_two_optimizers_stepped_on_the_same_gradients(start, clip, precision):
    """Bit for bit, with accumulation, clipping and weight decay, from a discriminator's first step on."""
    adam = partial(torch.optim.AdamW, lr=1e-3, betas=(0.5, 0.9), weight_decay=0.1)
    build = partial(autoencoder_stage, optimizer=adam, discriminator_lr=2e-3)
    one = fit(
        build(adversary=adversarial(start=start, form="non_saturating")), gradient_clip_val=clip, precision=precision
    )

    two = build(adversary=adversarial(start=start, form="non_saturating")).train()
    two.log_dict = lambda *_: None
    players = list(two.autoencoder.parameters()), list(two.loss.adversarial.discriminator.parameters())
    optimizers = adam(players[0]), adam(players[1], lr=2e-3)
    for step in range(STEPS):
        two._advanced_clock = lambda _, step=step: Clock(step, 0)
        gradients = []
        for number in range(ACCUMULATED):
            with torch.autocast("cpu", torch.bfloat16, precision == "bf16-mixed", cache_enabled=False):
                loss = two.training_step(batch(first=4 * (ACCUMULATED * step + number)), number) / ACCUMULATED
            gradients.append(torch.autograd.grad(loss, [*players[0], *players[1]]))
        summed = [sum(parts[1:], parts[0]) for parts in zip(*gradients, strict=True)]
        for parameter, gradient in zip([*players[0], *players[1]], summed, strict=True):
            parameter.grad = gradient
        for player, optimizer, first_step in zip(players, optimizers, (0, start), strict=True):
            if step >= first_step:
                if clip:
                    torch.nn.utils.clip_grad_norm_(player, clip)
                optimizer.step()
    found, fresh = (
        dict(one.named_parameters()),
        dict(build(adversary=adversarial(start=start, form="non_saturating")).named_parameters()),
    )
    assert [name for name, value in two.named_parameters() if not torch.equal(found[name], value)] == []
    assert [name for name, value in fresh.items() if torch.equal(found[name], value)] == []


def gradients(stage, term):
    """Which parts have received gradients after one backward pass through a term of the loss."""
    image = batch()["image"]
    reconstruction, _ = stage.autoencoder(image)
    difference = (image - reconstruction).square().sum()
    terms = stage.loss.adversarial(image, reconstruction, difference, stage.autoencoder.last_weight, Clock(0, 0))
    getattr(terms, term).backward()
    parts = {"autoencoder": stage.autoencoder, "discriminator": stage.loss.adversarial.discriminator}
    return {name for name, part in parts.items() if any(p.grad is not None for p in part.parameters())}


def test_each_adversarial_term_reaches_one_player_only():
    for term, reached in (("generator", {"autoencoder"}), ("discriminator", {"discriminator"})):
        assert gradients(autoencoder_stage(adversary=adversarial()), term) == reached


def test_a_discriminator_before_its_start_is_left_as_it_is():
    stage = autoencoder_stage(adversary=adversarial(start=100), optimizer=partial(torch.optim.AdamW, weight_decay=0.1))
    before = {name: value.clone() for name, value in stage.loss.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in fit(stage).loss.state_dict().items())


def test_the_decoder_alone_is_trained_and_latents_stay(monkeypatch):
    stage = autoencoder_stage(quantizer(update="ema", restart_after=1), calibrated=True, trains="decoder")
    before = {name: value.clone() for name, value in stage.autoencoder.state_dict().items()}
    after = fit(stage).autoencoder.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(before[name], value)}
    assert changed == {"from_latents", "decoder"}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_clock_counts_images_of_whole_steps(accumulated, monkeypatch):
    stage, clocks = quiet(autoencoder_stage(), monkeypatch), []
    forward = stage.loss.forward
    monkeypatch.setattr(stage.loss, "forward", lambda *given: clocks.append(given[-1]) or forward(*given))
    for number in range(4):
        monkeypatch.setattr(type(stage), "global_step", property(lambda _, n=number: n // accumulated))
        stage.training_step(batch(4), 0)
    assert [(clock.step, clock.images) for clock in clocks] == [
        (n // accumulated, 4 * accumulated * (n // accumulated)) for n in range(4)
    ]


def test_the_summary_tells_the_weight_under_both_reductions():
    fact = autoencoder_stage().facts()["regularizer"]
    assert "weight 1e-06 with reduction sum, which is 3.333e-07 with mean (768 pixel values, 256 latents" in fact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trains": "encoder"}, r"trains is 'encoder'; allowed are all and decoder; change `stage.trains`"),
        ({"trains": "decoder"}, r"never measured; allowed is a finished one.*`stage.autoencoder.checkpoint`"),
        ({"image_size": 15}, r"images are 15 x 15; allowed are multiples of 2.*change `image_size`"),
        ({"image_size": 4, "adversary": adversarial()}, r"too small for a discriminator.*change `adversarial"),
        ({"discriminator_lr": -1.0}, r"discriminator_lr is -1.0; allowed are .* change `stage.discriminator_lr`"),
    ],
)
def test_what_would_fail_late_is_refused_before_the_first_step(change, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_stage(**change)


def test_a_discriminator_that_never_begins_is_said_aloud(caplog):
    class Data(L.LightningDataModule):
        global_batch_size = 4

        def train_dataloader(self):
            return DataLoader(range(2), batch_size=None, collate_fn=lambda i: batch(first=4 * i))

    def warned(**arguments):
        caplog.clear()
        trainer = L.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
        trainer.fit(autoencoder_stage(adversary=adversarial(**arguments)), datamodule=Data())
        return "change `adversarial.start`, `adversarial.warmup` or `trainer.max_steps`" in caplog.text

    assert warned(start=1, warmup=1)
    assert not warned(start=0, warmup=1)
    assert warned(start=5, unit="images")
    assert not warned(start=4, unit="images")
