import pytest
import torch

from ldm_train.diffusion import DiffusionObjective, LossAwareTimes
from ldm_train.nn import ExponentialMovingAverage, adapted_layers, adapters_of
from ldm_train.stages import LatentDiffusion, LoRAFineTuning
from ldm_train.stages.lora import adaptable_networks

from ..conditioning.toy import clip
from ..nn.test_unet import randomised
from .toy import batch, diffusion_parts, latent_diffusion


@pytest.fixture
def base():
    stage = latent_diffusion()
    randomised(stage.denoiser.network)
    return stage.eval()


@pytest.fixture
def checkpoint(base, tmp_path):
    content = {"state_dict": base.state_dict()}
    base.on_save_checkpoint(content)
    torch.save(content, tmp_path / "base.ckpt")
    return tmp_path / "base.ckpt"


def lora(path, rank=2, alpha=1.0, **options):
    arguments = diffusion_parts() | options
    return LoRAFineTuning(str(path), "attention_and_feed_forward", rank, alpha, **arguments).eval()


def learn(stage):
    with torch.no_grad():
        for i, layer in enumerate(adapted_layers(stage).values()):
            for adapter in layer.of_adapters():
                adapter.up.normal_(generator=torch.Generator().manual_seed(i))
    return stage


def test_at_step_0_it_is_the_base_model_bit_for_bit(base, checkpoint):
    seeds = torch.arange(4)
    assert torch.equal(base.generate(batch(), seeds), lora(checkpoint).generate(batch(), seeds))


def test_disabled_adapters_give_the_base_model(base, checkpoint):
    stage, seeds = lora(checkpoint), torch.arange(4)
    learn(stage)
    adapted = stage.generate(batch(), seeds)
    with stage.adapters_disabled():
        assert torch.equal(stage.generate(batch(), seeds), base.generate(batch(), seeds))
    assert (adapted - base.generate(batch(), seeds)).abs().max() > 1e-2


def test_only_adapters_are_trained_and_saved(checkpoint, monkeypatch):
    monkeypatch.setattr(LoRAFineTuning, "log", lambda *_, **__: None)
    stage = lora(checkpoint)
    learn(stage)
    stage.training_step(batch(), 0)["loss"].backward()
    with_gradient = {name for name, p in stage.named_parameters() if p.grad is not None}
    content = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(content)
    assert set(content["state_dict"]) == with_gradient
    assert len(with_gradient) == 2 * stage.num_adapters()
    other = lora(checkpoint)
    other.on_load_checkpoint(content)
    seeds = torch.arange(4)
    assert torch.equal(other.generate(batch(), seeds), stage.generate(batch(), seeds))


@pytest.mark.parametrize("of_base", [True, False])
def test_what_an_objective_remembers_is_of_its_own_training(base, tmp_path, monkeypatch, of_base):
    monkeypatch.setattr(LatentDiffusion, "log", lambda *_, **__: None)
    remembering = [DiffusionObjective(times=LossAwareTimes(100, history=1)) for _ in range(3)]
    if of_base:
        base.objective = remembering[0].train()
        base.training_step(batch(), 0)
    content = {"state_dict": base.state_dict()}
    base.on_save_checkpoint(content)
    torch.save(content, tmp_path / "base.ckpt")
    arguments = (str(tmp_path / "base.ckpt"), "attention", 2, 1.0)
    stage, other = (LoRAFineTuning(*arguments, **diffusion_parts() | {"objective": o}) for o in remembering[1:])
    assert not any(value.any() for name, value in stage.state_dict().items() if name.startswith("objective."))
    stage.train().training_step(batch(), 0)
    saved = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(saved)
    other.on_load_checkpoint(saved)
    for name, value in stage.objective.state_dict().items():
        assert value.any()
        assert torch.equal(other.objective.state_dict()[name], value)


def test_averaged_base_weights_are_taken_where_there_are_any(base, checkpoint):
    average = ExponentialMovingAverage(base, decay=0.5)
    for value in average.average.values():
        value.mul_(0.9)
    content = torch.load(checkpoint, weights_only=True) | {"ema": average.state_dict()}
    torch.save(content, checkpoint)
    found = lora(checkpoint).denoiser.network.conv_in.weight
    torch.testing.assert_close(found, 0.9 * base.denoiser.network.conv_in.weight)


def test_adapters_of_another_base_or_rank_are_refused(base, checkpoint, tmp_path):
    stage = lora(checkpoint)
    content = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(content)
    with pytest.raises(ValueError, match=r"other shape"):
        lora(checkpoint, rank=3).on_load_checkpoint(content)
    with torch.no_grad():
        base.denoiser.network.conv_in.weight.add_(1.0)
    other = {"state_dict": base.state_dict()}
    base.on_save_checkpoint(other)
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"another base model .* change `stage.base_checkpoint`"):
        lora(tmp_path / "other.ckpt").on_load_checkpoint(content)


def test_a_checkpoint_of_another_stage_is_no_base(base, checkpoint, tmp_path):
    stage = lora(checkpoint)
    adapters = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(adapters)
    first = {"state_dict": {f"autoencoder.{k}": v for k, v in base.autoencoder.state_dict().items()}, "frozen": {}}
    for number, content in ((3, adapters), (1, first)):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=rf"is of stage {number}; allowed is stage 2.*`stage.base_checkpoint`"):
            lora(tmp_path / "other.ckpt")


def test_a_base_of_weights_that_are_not_finite_is_refused(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["denoiser.network.conv_in.bias"][0] = float("nan")
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"the first is conv_in.bias; allowed are finite numbers; .*base_checkpoint"):
        lora(checkpoint)


def test_a_missing_base_names_the_key():
    with pytest.raises(FileNotFoundError, match=r"change `stage.base_checkpoint`"):
        lora("nowhere.ckpt")


# With the text encoder, and everything else that adapters can have.

EVERYTHING = {"scale_mode": "rank_stabilised", "dropout": 0.3, "dora": True, "text_encoder": {"targets": "attention"}}


def clip_parts():
    return {"conditioner": clip(width=16)}


@pytest.fixture
def clip_base(tmp_path):
    stage = latent_diffusion(**clip_parts()).eval()
    randomised(stage.denoiser.network)
    content = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(content)
    torch.save(content, tmp_path / "clip_base.ckpt")
    return stage, tmp_path / "clip_base.ckpt"


def test_with_an_adapted_text_encoder_it_starts_at_the_base_model_bit_for_bit(clip_base):
    base, path = clip_base
    stage, seeds = lora(path, **clip_parts(), **EVERYTHING), torch.arange(4)
    assert torch.equal(stage.generate(batch(), seeds), base.generate(batch(), seeds))
    learn(stage)
    contexts = stage.condition(batch()).context, base.condition(batch()).context
    assert (contexts[0] - contexts[1]).abs().max() > 1e-2
    with stage.adapters_disabled():
        assert torch.equal(stage.generate(batch(), seeds), base.generate(batch(), seeds))


def test_the_names_of_adapters_begin_with_their_network(clip_base):
    stage = lora(clip_base[1], **clip_parts(), **EVERYTHING)
    adapters = stage.adapters()
    assert list(adapters) == stage.adapted
    assert len(adapters) == stage.num_adapters()
    assert "unet.down.1.blocks.0.transformer.blocks.0.self_attention.to_q" in adapters
    assert "text_encoder.transformer.resblocks.2.attn.v_proj" in adapters
    assert adapters.keys() == stage.scales().keys()
    assert {change.alpha for change in adapters.values()} == {1 / 2**0.5}
    networks = adaptable_networks(stage)
    assert adapters_of(networks, "default").keys() == adapters.keys()
    assert networks["unet"] is stage.denoiser.network


def run(stage, optimizer, steps):
    stage.train()
    for step in steps:
        optimizer.zero_grad()
        stage.training_step(batch(epoch=1, first=step), step)["loss"].backward()
        optimizer.step()


def adam(stage):
    return torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(clip_base, monkeypatch, precision):
    monkeypatch.setattr(LatentDiffusion, "log", lambda *_, **__: None)

    def fresh():
        torch.manual_seed(0)
        return lora(clip_base[1], **clip_parts(), **EVERYTHING, base_precision=precision)

    whole = fresh()
    run(whole, adam(whole), range(4))

    first = fresh()
    optimizer = adam(first)
    run(first, optimizer, range(2))
    content = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(content)
    torch.manual_seed(99)
    second = lora(clip_base[1], **clip_parts(), **EVERYTHING, base_precision=precision)
    second.on_load_checkpoint(content)
    resumed = adam(second)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_dropout_is_keyed_by_the_step_and_off_outside_of_training(clip_base, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "log", lambda *_, **__: None)
    stage = learn(lora(clip_base[1], **clip_parts(), **EVERYTHING)).train()
    losses = [stage.training_step(batch(), step)["loss"] for step in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]
    tower = stage.conditioner.encoder.tower
    dropouts = [m for m in tower.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert len(dropouts) == 12
    assert all(m.training for m in dropouts)
    assert not tower.training
    stage.eval()
    assert not any(m.training for m in dropouts)
    assert torch.equal(stage.condition(batch()).context, stage.condition(batch()).context)


def test_a_bfloat16_base_is_half_the_size_and_the_same_base_model(clip_base):
    whole, half = (lora(clip_base[1], **clip_parts(), base_precision=p) for p in ("float32", "bfloat16"))
    assert whole.base_digest == half.base_digest
    frozen = [p for p in half.denoiser.network.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}


def test_the_summary_prints_the_resolved_scale(clip_base):
    options = {"scale_mode": "alpha_over_rank", "text_encoder": {"targets": "attention", "rank": 8, "alpha": 4.0}}
    facts = lora(clip_base[1], alpha=1.0, rank=4, **clip_parts(), **options).facts()
    assert facts["scale of unet"] == "W' = W + s B A with s = 0.25 (alpha_over_rank, alpha 1)"
    assert facts["scale of text_encoder"] == "W' = W + s B A with s = 0.5 (alpha_over_rank, alpha 4)"
    assert facts["adapters of text_encoder"] == "12 layers, rank 8"


def test_adapters_of_another_scale_are_refused(checkpoint):
    stage = lora(checkpoint)
    content = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(content)
    with pytest.raises(ValueError, match=r"has the scale 1.0, this run's 2.0; allowed .* change `stage.alpha`"):
        lora(checkpoint, alpha=2.0).on_load_checkpoint(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_encoder": {"targets": "attention"}},
            r"not one text encoder .* `stage.text_encoder` to null",
        ),
        ({"text_encoder": {"ranks": 3}}, r"has the key 'ranks'; allowed are targets, .* change `stage.text_encoder`"),
        ({"base_precision": "int8"}, r"'int8'; allowed are float32 and bfloat16; change `stage.base_precision`"),
        ({"dropout": 2.0}, r"change `stage.dropout`"),
    ],
)
def test_what_cannot_be_adapted_is_refused(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        lora(checkpoint, **options)


def test_errors_of_the_text_encoder_name_its_own_keys(clip_base):
    with pytest.raises(ValueError, match=r"rank is 99 .* change `stage.text_encoder.rank`"):
        lora(clip_base[1], **clip_parts(), text_encoder={"targets": "attention", "rank": 99})
