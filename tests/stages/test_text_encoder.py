"""One text encoder in the files of many."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm_train.interchange.clip import from_open_clip
from ldm_train.stages import load_text_encoder

from ..conditioning.toy import clip_encoder

LAYERS = 3
TOKENS = torch.tensor([[49406, 320, 736, 49407] + [0] * 8])
CONFIG = {"hidden_act": "gelu", "num_attention_heads": 2}


@pytest.fixture(scope="module")
def trained():
    return clip_encoder()


@pytest.fixture(scope="module")
def tensors(trained):
    return trained.tower.state_dict()


def fresh(**changes):
    encoder = clip_encoder(**changes)
    for parameter in encoder.parameters():
        parameter.mul_(0.5)
    return encoder


def transformers_folder(folder, tensors, config=CONFIG):
    folder.mkdir(parents=True)
    save_file(from_open_clip(tensors, LAYERS), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def open_clip_safetensors(root, tensors):
    save_file({**tensors, "logit_scale": torch.zeros(1)}, root / "open_clip_model.safetensors")
    return root / "open_clip_model.safetensors"


def open_clip_training(root, tensors):
    state = {f"module.{name}": value for name, value in tensors.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, root / "epoch_3.pt")
    return root / "epoch_3.pt"


def transformers_bin(root, tensors):
    torch.save(from_open_clip(tensors, LAYERS), root / "pytorch_model.bin")
    return root


def pipeline_folder(root, tensors):
    transformers_folder(root / "text_encoder", tensors)
    return root


def stable_diffusion(root, tensors):
    inner = {f"cond_stage_model.transformer.{n}": v for n, v in from_open_clip(tensors, LAYERS).items()}
    unet = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    torch.save({"state_dict": {"state_dict": inner | unet, "epoch": 1}}, root / "sd.ckpt")
    return root / "sd.ckpt"


WAYS = [
    open_clip_safetensors,
    open_clip_training,
    transformers_bin,
    pipeline_folder,
    stable_diffusion,
    lambda root, tensors: transformers_folder(root / "text_encoder", tensors),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_kind_of_file_gives_the_same_encoder(way, trained, tensors, tmp_path):
    encoder = load_text_encoder(fresh(), str(way(tmp_path, tensors)))
    assert torch.equal(encoder(TOKENS), trained(TOKENS))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_layer_that_is_not_used_may_be_there_or_not(trained, tensors, tmp_path):
    expected = trained.tower.ln_final(
        trained.tower.forward_intermediates(TOKENS, [1], output_fmt="NLC", intermediates_only=True)[
            "text_intermediates"
        ][0]
    )
    without = {name: value for name, value in tensors.items() if "resblocks.2." not in name}
    for number, state in enumerate((tensors, without)):
        (tmp_path / str(number)).mkdir()
        encoder = fresh(layer="penultimate")
        load_text_encoder(encoder, str(open_clip_safetensors(tmp_path / str(number), state)))
        torch.testing.assert_close(encoder(TOKENS), expected)


def test_untrained_leaves_it_random():
    encoder = fresh()
    before = encoder(TOKENS)
    assert torch.equal(load_text_encoder(encoder, "untrained")(TOKENS), before)


def test_weights_of_another_precision_are_taken(trained, tensors, tmp_path):
    half = {name: value.half() for name, value in tensors.items()}
    context = load_text_encoder(fresh(), str(open_clip_safetensors(tmp_path, half)))(TOKENS)
    torch.testing.assert_close(context, trained(TOKENS), rtol=0.0, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"width": 64}, "other shape"),
        ({"num_layers": 4}, "missing"),
        ({"num_layers": 2}, "unexpected"),
        ({"num_layers": 2, "layer": "penultimate"}, "transformer.resblocks.2.ln_1.weight"),
        ({"context_length": 77}, "positional_embedding"),
    ],
)
def test_weights_of_another_architecture_are_refused(changes, difference, tensors, tmp_path):
    path = open_clip_safetensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"change `conditioner.encoder.weights`, or the architecture in") as refused:
        load_text_encoder(fresh(**changes), str(path))
    assert str(path) in str(refused.value)
    assert difference in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [({"activation": "quick_gelu"}, "`hidden_act` 'gelu'"), ({"num_heads": 4}, "`num_attention_heads` 2")],
)
@pytest.mark.parametrize("config", [CONFIG, {"text_config": CONFIG, "hidden_act": "other"}], ids=["encoder", "CLIP"])
def test_what_no_tensor_tells_is_read_in_the_folders_config(changes, theirs, config, tensors, tmp_path):
    folder = transformers_folder(tmp_path / "text_encoder", tensors, config)
    key = rf"change `conditioner.encoder.encoder.{next(iter(changes))}`"
    with pytest.raises(ValueError, match=rf"config.json says {theirs}, the encoder has .*; {key}"):
        load_text_encoder(fresh(**changes), str(folder))


def test_an_absent_file_says_where_it_comes_from(tmp_path):
    message = r"at .*absent; allowed are .*; run `python tools/fetch_weights.py clip_l14` .* change `other.key`"
    with pytest.raises(FileNotFoundError, match=message):
        load_text_encoder(fresh(), str(tmp_path / "absent"), key="other.key")


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.bin"])
def test_a_damaged_file_is_refused(name, tensors, tmp_path):
    path = (
        open_clip_safetensors(tmp_path, tensors) if name.endswith("tensors") else open_clip_training(tmp_path, tensors)
    )
    (tmp_path / name).write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name} .*change `conditioner.encoder.weights`"):
        load_text_encoder(fresh(), str(tmp_path / name))


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="0 text towers of CLIP among 1 tensors"):
        load_text_encoder(fresh(), str(tmp_path / "other.ckpt"))
