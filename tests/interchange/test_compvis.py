import json

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from ldm_train.interchange import Architecture, export_compvis, export_diffusers, import_compvis
from ldm_train.interchange.compvis import RECORD, as_metadata, contents, from_metadata
from ldm_train.interchange.latents import scaled, uncalibrated

from .networks import KINDS, SMALL, learned, random_autoencoder, same


def exported(node=SMALL, mean=0.5, std=2.0):
    autoencoder = random_autoencoder(node)
    channels = torch.ones(autoencoder.latent_channels)
    autoencoder.calibrate(mean * channels, std * channels.cumsum(0))
    return autoencoder, *export_compvis(node, autoencoder.state_dict())


@pytest.mark.parametrize("node", KINDS.values(), ids=KINDS)
def test_export_then_import_is_the_identity(node):
    autoencoder, tensors, record = exported(node)
    for file in (
        {"state_dict": tensors, RECORD: record},
        {"state_dict": {"state_dict": tensors}, RECORD: record},
        {"state_dict": tensors, **from_metadata(as_metadata(record))},
    ):
        found = contents(file)
        assert found.record["autoencoder"] == node
        assert same(import_compvis(found, node).state, learned(autoencoder))
    assert json.loads(json.dumps(record)) == record


def test_what_was_never_measured_stays_so():
    autoencoder = random_autoencoder(SMALL)
    tensors, record = export_compvis(SMALL, autoencoder.state_dict())
    assert same(import_compvis(contents({"state_dict": tensors, RECORD: record}), SMALL).state, learned(autoencoder))


@pytest.mark.parametrize("kind", ["plain", "no attention", "other multipliers", "vq"])
def test_diffusers_own_converter_agrees(kind):
    """Two routes to diffusers: its converter of the published layout, and our export. (It knows no level attention.)"""
    node = KINDS[kind]
    autoencoder, tensors, _ = exported(node)
    config, direct = export_diffusers(node, autoencoder.state_dict())
    converted = convert_ldm_vae_checkpoint(dict(tensors), config)
    direct.pop("quantize.embedding.weight", None)  # nor codebooks
    assert same(converted, direct)


def test_a_whole_model_is_searched_for_its_autoencoder():
    autoencoder, tensors, _ = exported()
    inside = {f"first_stage_model.{name}": value for name, value in tensors.items()}
    others = {
        "model.diffusion_model.out.2.weight": torch.zeros(1),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "betas": torch.zeros(3),
    }
    imported = import_compvis(contents({"state_dict": inside | others, "global_step": 7}), SMALL)
    assert imported.ignored == {"model": 1, "first_stage_model": 1, "betas": 1}
    weights = {name: value for name, value in learned(autoencoder).items() if not name.startswith("latent_")}
    assert same(imported.state, weights | uncalibrated(4))


def test_the_scale_factor_of_a_whole_model_is_the_latents_scale():
    _, tensors, _ = exported()
    state = {f"first_stage_model.{name}": value for name, value in tensors.items()}
    imported = import_compvis(contents(state | {"scale_factor": torch.tensor(0.25)}), SMALL)
    assert same({name: imported.state[name] for name in ("latent_mean", "latent_std")}, scaled(0.25, 4))


def test_the_training_s_networks_are_left_out_and_counted():
    _, tensors, _ = exported()
    extra = ["loss.discriminator.main.0.weight", "loss.logvar", "model_ema.decay"]
    found = contents({"state_dict": tensors | dict.fromkeys(extra, torch.zeros(1))})
    assert found.ignored == {"loss": 2, "model_ema": 1}
    assert found.tensors.keys() == tensors.keys()


def test_strangers_stay_for_the_strict_comparison():
    _, tensors, _ = exported()
    imported = import_compvis(contents(tensors | {"quantize.used": torch.zeros(1)}), SMALL)
    assert "quantize.used" in imported.state


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ValueError, match=r"entry 'lr' is no named tensor; allowed .*; name another file"):
        contents({"state_dict": {"lr": 1.0}})


def test_a_damaged_record_is_refused():
    with pytest.raises(ValueError, match=r"metadata 'ldm_train' is damaged .*; allowed is JSON"):
        from_metadata({RECORD: "{"})


def test_a_node_must_describe_something_publishable():
    with pytest.raises(ValueError, match=r"allowed here: ldm_train.nn.KLRegularizer, ldm_train.nn.VectorQuantizer"):
        Architecture.of(SMALL | {"regularizer": {"_target_": "mine.Regularizer"}})
