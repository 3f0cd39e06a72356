"""Whatever file a base model comes from, stage 3 starts from the same weights, or refuses with the reason."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_train.checkpoint import digest
from ldm_train.conditioning import CombinedConditioner, NoConditioner, TransformerTextConditioner
from ldm_train.diffusion import Denoiser, cosine_schedule, scaled_linear_schedule
from ldm_train.interchange import build, build_unet
from ldm_train.stages.base_model import load_foreign_base

from ..conditioning.toy import clip
from ..interchange.models import random_model
from ..interchange.networks import SMALL
from ..interchange.unets import SMALL_UNET

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from convert_model import COMPVIS, DIFFUSERS, OURS, write_model

PLACES = {"sd.safetensors": COMPVIS, "sd.ckpt": COMPVIS, "pipeline": DIFFUSERS, "ours": OURS}


def written(tmp_path, place, **kind):
    model = random_model(**kind)
    write_model(tmp_path / place, PLACES[place], model)
    return tmp_path / place, model


def parts(prediction="epsilon", schedule=None, **changes):
    unet = build_unet(SMALL_UNET | changes)
    denoiser = Denoiser(unet, schedule or scaled_linear_schedule(1000, 0.00085, 0.012), prediction)
    return denoiser, build(SMALL), NoConditioner()


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_from_every_kind_of_file_comes_the_same_model(place, averaged, tmp_path):
    path, model = written(tmp_path, place, averaged=averaged)
    denoiser, autoencoder, conditioner = parts()
    assert load_foreign_base(path, denoiser, autoencoder, conditioner)
    wanted = model.average.state if averaged else model.unet.state
    assert all(torch.equal(value, wanted[name]) for name, value in denoiser.network.state_dict().items())
    first_stage = model.autoencoder.state
    for name, value in autoencoder.state_dict().items():
        torch.testing.assert_close(value, first_stage[name], rtol=1e-6, atol=0)


def test_a_calibrated_autoencoder_is_kept(tmp_path):
    path, _ = written(tmp_path, "sd.safetensors")
    denoiser, autoencoder, conditioner = parts()
    autoencoder.calibrate(torch.zeros(4), torch.ones(4))
    before = digest(autoencoder)
    assert load_foreign_base(path, denoiser, autoencoder, conditioner)
    assert digest(autoencoder) == before


@pytest.mark.parametrize("content", [{"state_dict": {"denoiser.network.x": torch.ones(1)}, "frozen": {}}, None])
def test_a_checkpoint_of_a_run_and_an_absent_file_are_left_to_the_stage(content, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "last.ckpt")
    assert not load_foreign_base(tmp_path / "last.ckpt", *parts())


@pytest.mark.parametrize(
    ("place", "config", "message"),
    [
        ("pipeline", {"prediction": "v"}, r"predicts 'epsilon', the config says 'v'; .* `stage.denoiser.prediction`"),
        ("ours", {"prediction": "v"}, r"predicts 'epsilon', the config says 'v'; .* `stage.denoiser.prediction`"),
        ("sd.ckpt", {"schedule": cosine_schedule(1000)}, r"noise schedule has 1000 steps from .* change `schedule`"),
        ("ours", {"schedule": cosine_schedule(1000)}, r"noise schedule has 1000 steps from .* change `schedule`"),
        ("pipeline", {"num_heads": 8}, r"heads \(4, 4, 4\), the config's \(8, 8, 8\); allowed .* change `unet`"),
        ("sd.safetensors", {"num_res_blocks": 2}, r"is not the base model of this config: .*; see `stage.base_check"),
    ],
)
def test_another_model_than_the_config_s_is_refused(place, config, message, tmp_path):
    path, _ = written(tmp_path, place)
    with pytest.raises(ValueError, match=message):
        load_foreign_base(path, *parts(**config))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = random_model(averaged=False)
    model.unet.state["conv_in.bias"][0] = float("nan")
    write_model(tmp_path / "sd.safetensors", COMPVIS, model)
    with pytest.raises(ValueError, match=r"1 tensors .* not finite, the first is conv_in.bias; .* `stage.base_check"):
        load_foreign_base(tmp_path / "sd.safetensors", *parts())


def test_latents_of_unknown_scale_are_refused(tmp_path):
    model = random_model()
    write_model(tmp_path / "sd.ckpt", COMPVIS, model)
    content = torch.load(tmp_path / "sd.ckpt", weights_only=True)
    state = {name: value for name, value in content["state_dict"].items() if name != "scale_factor"}
    save_file(state, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match=r"does not say how its latents are scaled; .* `stage.autoencoder.checkpoint`"):
        load_foreign_base(tmp_path / "sd.safetensors", *parts())


def test_a_conditioner_that_was_learned_with_the_unet_is_refused_for_no_file_has_it(tmp_path):
    path, _ = written(tmp_path, "sd.safetensors")
    denoiser, autoencoder, _ = parts()
    frozen, learned = clip(), TransformerTextConditioner(32, 12, num_layers=1, num_heads=2)
    assert load_foreign_base(path, denoiser, autoencoder, frozen)
    assert load_foreign_base(path, denoiser, autoencoder, CombinedConditioner({"text": frozen}))
    message = r"no weights for \d+ parameters of the conditioner, .*the first is .*position.*`stage.base_checkpoint`"
    for conditioner in (learned, CombinedConditioner({"text": learned})):
        with pytest.raises(ValueError, match=message):
            load_foreign_base(path, denoiser, autoencoder, conditioner)
