import pytest
import torch

from ldm_train.diffusion import DiffusionObjective, LossAwareTimes
from ldm_train.nn import ExponentialMovingAverage, adapted_layers
from ldm_train.stages import LatentDiffusion, LoRAFineTuning

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


def test_a_missing_base_names_the_key():
    with pytest.raises(FileNotFoundError, match=r"change `stage.base_checkpoint`"):
        lora("nowhere.ckpt")
