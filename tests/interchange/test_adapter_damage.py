"""Files of adapters whose numbers make no sense are refused with words, and what is not said is as peft takes it."""

import json
import math
from dataclasses import replace

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_train.interchange import AdapterBase, AdapterMetadata, read_adapters, write_adapters
from ldm_train.interchange.adapter_files import PEFT_CONFIG

from .adapters import SMALL_BASE, random_adapters
from .unets import SMALL_UNET

CHOSEN = r"unet\..*self_attention\.to_q"


def written(path, layout, change=None, header=None, **kind):
    """A file whose tensors and header were changed afterwards; a header of `{}` says nothing."""
    write_adapters(path, random_adapters(chosen=CHOSEN, **kind), AdapterMetadata(SMALL_BASE), layout)
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, path, metadata=found if header is None else header)
    return path


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-1e999", "1" + "0" * 400])
@pytest.mark.parametrize("settings", ['{{"unet.lora_alpha": {}}}', '{{"unet.alpha_pattern": {{".*": {}}}}}'])
def test_a_scale_of_a_header_that_is_not_finite_is_refused(alpha, settings, tmp_path):
    header = {"lora_adapter_metadata": settings.format(alpha)}
    path = written(tmp_path / "a.safetensors", "diffusers", header=header)
    with pytest.raises(ValueError, match=r"lora_alpha of unet\..* is .*; allowed is a finite number; name another"):
        read_adapters(path, SMALL_BASE)


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["ours", "kohya", "diffusers"])
def test_a_scale_that_is_not_finite_is_not_written(layout, alpha, tmp_path):
    adapters = random_adapters(chosen=CHOSEN)
    key = next(iter(adapters))
    adapters[key] = replace(adapters[key], alpha=alpha)
    with pytest.raises(ValueError, match=r"scales of 1 adapters are not finite \(unet\..*\); allowed are finite"):
        write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(SMALL_BASE), layout)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "down", "up"), [("ours", ".down", ".up"), ("kohya", "lora_down.weight", "lora_up.weight")]
)
def test_a_rank_of_0_is_refused(layout, down, up, tmp_path):
    def shrink(tensors):
        for name, value in tensors.items():
            tensors[name] = value[:0] if name.endswith(down) else value[:, :0] if name.endswith(up) else value

    path = written(tmp_path / "a.safetensors", layout, shrink)
    with pytest.raises(ValueError, match=r"rank is 0; allowed is 1 at least; name another file"):
        read_adapters(path)


def test_a_magnitude_beside_a_b_without_a_shape_is_refused(tmp_path):
    def flatten(tensors):
        name = next(name for name in tensors if name.endswith(".up"))
        tensors[name] = torch.tensor(1.0)

    path = written(tmp_path / "a.safetensors", "ours", flatten, dora=True)
    with pytest.raises(ValueError, match=r"its B \(\); allowed are"):
        read_adapters(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": "a"}, r"is damaged \(a size of a network is no whole number from 0 to \d+\); allowed"),
        ({"channels": 10**12}, r"is damaged \(a size of a network is no whole number from 0 to \d+\); allowed"),
        ({"context_dim": -1}, r"is damaged \(a size of a network is no whole number from 0 to \d+\); allowed"),
        ({"dropout": "a"}, r"is damaged \(a share is no number\); allowed"),
        ({"num_res_blocks": 3000}, r"says \d+ blocks of its U-Net; allowed are up to 500"),
        ({"transformer_depth": 10**4}, r"says \d+ blocks of its U-Net; allowed are up to 500"),
    ],
)
def test_a_record_of_no_model_is_refused_before_one_is_built(changes, message, tmp_path):
    record = {"version": 1, "unet": SMALL_UNET | changes, "text_encoder": None, "base_digest": None}
    header = {"ldm_train": json.dumps({"adapters": record | {"trigger_words": []}})}
    path = written(tmp_path / "a.safetensors", "ours", header=header)
    with pytest.raises(ValueError, match=message):
        read_adapters(path)


@pytest.mark.parametrize(("config", "scale"), [({}, 2.0), ({"r": 4, "use_rslora": True}, 4.0), (None, 1.0)])
def test_settings_without_an_alpha_have_that_of_peft_and_no_settings_a_scale_of_1(config, scale, tmp_path):
    assert peft.LoraConfig().lora_alpha == 8
    written(tmp_path / "adapter_model.safetensors", "diffusers", header={})
    if config is not None:
        (tmp_path / PEFT_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    found = read_adapters(tmp_path, AdapterBase(SMALL_UNET))
    assert {adapter.alpha for adapter in found.adapters.values()} == {scale}


@pytest.mark.parametrize(
    ("settings", "scale"), [({"unet.r": 4}, 2.0), ({"r": 4}, 2.0), ({"text_encoder_2.r": 4}, 1.0), ({}, 1.0)]
)
def test_a_header_without_an_alpha_likewise_where_it_speaks_of_the_part(settings, scale, tmp_path):
    header = {"lora_adapter_metadata": json.dumps(settings)}
    path = written(tmp_path / "a.safetensors", "diffusers", header=header)
    assert {adapter.alpha for adapter in read_adapters(path, SMALL_BASE).adapters.values()} == {scale}


@pytest.mark.parametrize("layout", ["ours", "kohya"])
def test_notes_of_the_tensors_do_not_outlive_them(layout, tmp_path):
    stale = {"ss_network_dim": "64", "ss_network_alpha": "32", "modelspec.hash_sha256": "0x12", "sshs_model_hash": "a"}
    kept = {"ss_training_comment": "hello"}
    metadata = AdapterMetadata(SMALL_BASE, notes=stale | kept)
    write_adapters(tmp_path / "a.safetensors", random_adapters(chosen=CHOSEN), metadata, layout)
    notes = read_adapters(tmp_path / "a.safetensors").metadata.notes
    assert kept.items() <= notes.items()
    own = {"ss_network_dim": "4", "ss_network_alpha": "4.0"} if layout == "kohya" else {}
    assert {name: value for name, value in notes.items() if name in stale} == own
