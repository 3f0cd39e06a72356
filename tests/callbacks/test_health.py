import pytest
import torch

from ldm_train.callbacks import AutoencoderHealth
from tests.callbacks.toy import ToyData, ToyStage, trainer_of

CAP = 100.0
HEALTHY = {
    "logits_real": 0.5,
    "logits_fake": -0.5,
    "adaptive_weight": 3.0,
    "codebook_usage": 0.9,
    "latent_std": 1.0,
}
ILL = [
    # what goes wrong, the figure in the warning, its cause, keys to change
    ({"logits_real": 2.0, "logits_fake": -1.5}, "by 3.5, more than 3", "it wins", ["adversarial.r1_weight"]),
    ({"adaptive_weight": CAP}, "adaptive_weight is 100", "saturated", ["adversarial.warmup"]),
    (
        {"codebook_usage": 0.1},
        "codebook_usage is 0.1, below 0.25",
        "few codes",
        ["autoencoder.regularizer.restart_after"],
    ),
    ({"latent_std": 0.01}, "latent_std is 0.01, below 0.05", "collapse", ["autoencoder.regularizer.weight"]),
    ({"latent_std": 60.0}, "latent_std is 60, above 50", "grow", ["autoencoder.regularizer.weight", "optimizer.lr"]),
    ({"latent_std": 3.5}, "3.5 times the 1 ", "come to rest", ["autoencoder.regularizer.weight", "optimizer.lr"]),
    ({"latent_std": 0.3}, "0.3 times the 1 ", "come to rest", ["autoencoder.regularizer.weight", "optimizer.lr"]),
]


@pytest.fixture
def health():
    """Has seen healthy latents."""
    callback = AutoencoderHealth(patience=3, repeat_after=10)
    callback.judge(0, HEALTHY, CAP)
    return callback


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ldm_train.callbacks.health"]


def _judge(health, figures, steps, first=1):
    for step in range(first, first + steps):
        health.judge(step, HEALTHY | figures, CAP)


def test_a_healthy_run_hears_nothing(health, caplog):
    _judge(health, {}, 50)
    _judge(health, {"adaptive_weight": 0.99 * CAP, "codebook_usage": 0.26, "latent_std": 2.9, "logits_real": 2.4}, 50)
    assert _warnings(caplog) == []


@pytest.mark.parametrize(("figures", "figure", "cause", "keys"), ILL)
def test_each_illness_is_told_with_figure_cause_and_key(health, caplog, figures, figure, cause, keys):
    _judge(health, figures, 3)
    about = [message for message in _warnings(caplog) if figure in message]
    assert len(about) == 1
    assert about[0].startswith("step 3: ")
    assert cause in about[0]
    assert all(f"`{key}" in about[0] for key in keys)


def test_a_cap_that_float32_rounds_down_is_still_the_cap(health, caplog):
    cap = 0.7
    figure = float(torch.tensor(1e9).clamp(max=cap))
    assert figure < cap
    for step in range(health.patience):
        health.judge(step, {"adaptive_weight": figure}, cap)
    assert "its cap" in caplog.text


@pytest.mark.parametrize("missing", [{"logits_fake"}, {"codebook_usage"}, {"latent_std"}, set(HEALTHY)])
def test_what_is_not_logged_is_not_judged(health, caplog, missing):
    ill = HEALTHY | {"logits_real": 9.0, "codebook_usage": 0.0, "latent_std": 100.0}
    present = {name: value for name, value in ill.items() if name not in missing}
    for step in range(5):
        health.judge(step, present, cap=None)
    told = " ".join(_warnings(caplog))
    assert ("logits" in told) == ("logits_fake" in present)
    assert ("codebook_usage" in told) == ("codebook_usage" in present)
    assert ("latent_std" in told) == ("latent_std" in present)


def test_it_must_last_for_as_long_as_patience(health, caplog):
    _judge(health, {"codebook_usage": 0.1}, 2)
    _judge(health, {}, 1)
    _judge(health, {"codebook_usage": 0.1}, 2)
    assert _warnings(caplog) == []
    _judge(health, {"codebook_usage": 0.1}, 1, first=6)
    assert len(_warnings(caplog)) == 1


def test_each_kind_is_repeated_after_its_own_while(health, caplog):
    _judge(health, {"codebook_usage": 0.1}, 25)
    _judge(health, {"codebook_usage": 0.1, "adaptive_weight": CAP}, 10, first=26)
    steps = [(message.split()[1], "codebook" in message) for message in _warnings(caplog)]
    assert steps == [("3:", True), ("13:", True), ("23:", True), ("28:", False), ("33:", True)]


def test_a_resumed_run_goes_on(health, caplog):
    _judge(health, {"codebook_usage": 0.1}, 4)
    _judge(health, {"adaptive_weight": CAP, "codebook_usage": 0.1}, 2, first=5)
    resumed = AutoencoderHealth(patience=3, repeat_after=10)
    resumed.load_state_dict(health.state_dict())
    caplog.clear()
    _judge(resumed, {"adaptive_weight": CAP, "codebook_usage": 0.1, "latent_std": 4.0}, 3, first=7)
    told = _warnings(caplog)
    assert ["adaptive_weight" in told[0], "4 times the 1 " in told[1], len(told)] == [True, True, 2]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"patience": 0}, "patience"),
        ({"repeat_after": 0}, "repeat_after"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"max_latent_std_drift": 0.5}, "max_latent_std_drift"),
        ({"latent_std_range": (2.0, 1.0)}, "latent_std_range"),
        ({"latent_std_range": (1.0,)}, "latent_std_range"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change, key):
    with pytest.raises(ValueError, match=rf"{key} is .*; allowed .*; change `callbacks\.health\.{key}`"):
        AutoencoderHealth(**change)


class Adversarial(torch.nn.Module):
    max_adaptive_weight = CAP


class Loss(torch.nn.Module):
    def __init__(self, adversarial):
        super().__init__()
        self.adversarial = adversarial


class Ill(ToyStage):
    """From step 5 on, the adaptive weight stands at its cap and the latents are four times as wide."""

    def __init__(self, adversarial):
        super().__init__()
        self.loss = Loss(adversarial)

    def training_step(self, batch, batch_idx):
        ill = self.global_step + 1 >= 5
        self.log("train/adaptive_weight", torch.tensor(CAP if ill else 1.0))
        self.log("train/latent_std", torch.tensor(4.0 if ill else 1.0, dtype=torch.float64))
        return super().training_step(batch, batch_idx)


def _fit(tmp_path, health, adversarial=None, **options):
    options = {"max_steps": 16, "limit_val_batches": 0, "log_every_n_steps": 2, **options}
    trainer = trainer_of(tmp_path, [health], **options)
    trainer.fit(Ill(adversarial), ToyData())
    return trainer


def test_a_run_is_judged_on_logged_steps_after_the_warm_up(tmp_path, monkeypatch, caplog):
    health = AutoencoderHealth(warmup_steps=3, patience=2)
    judged, judge = [], health.judge
    monkeypatch.setattr(health, "judge", lambda step, *given: judged.append((step, *given)) or judge(step, *given))
    _fit(tmp_path, health, Adversarial(), accumulate_grad_batches=2, max_steps=9)
    assert [step for step, *_ in judged] == [4, 6, 8]
    assert judged[0][1:] == ({"adaptive_weight": 1.0, "latent_std": 1.0}, CAP)
    told = _warnings(caplog)
    assert [message.split(":")[0] for message in told] == ["step 8", "step 8"]
    assert "adaptive_weight is 100" in told[0]
    assert "4 times the 1 that it was after 3 steps" in told[1]


def test_without_a_discriminator_there_is_no_cap(tmp_path, caplog):
    _fit(tmp_path, AutoencoderHealth(warmup_steps=0, patience=1))
    assert all("latent_std" in message for message in _warnings(caplog))
    assert len(_warnings(caplog)) == 1


def test_other_ranks_are_silent(tmp_path, monkeypatch, caplog):
    trainer = trainer_of(tmp_path, [])
    monkeypatch.setattr(type(trainer), "global_step", 2)
    monkeypatch.setattr(type(trainer), "callback_metrics", {"train/latent_std": torch.tensor(100.0)})
    told = []
    for first in (True, False):
        monkeypatch.setattr(type(trainer), "is_global_zero", first)
        AutoencoderHealth(warmup_steps=0, patience=1).on_train_batch_end(trainer, Ill(None), None, None, 0)
        told.append(len(_warnings(caplog)))
    assert told == [1, 1]


def test_the_state_is_in_the_checkpoint(tmp_path):
    health = AutoencoderHealth(warmup_steps=0, patience=1)
    trainer = _fit(tmp_path, health)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["AutoencoderHealth"]
    assert state == health.state_dict()
    assert state["first_latent_std"] == 1.0
