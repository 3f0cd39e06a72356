"""Files of adapters: there and back, what is recognised, and what is refused with words."""

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_train.config import conf_dir
from ldm_train.interchange import (
    AdapterBase,
    AdapterMetadata,
    TextShape,
    UNetArchitecture,
    build_unet,
    read_adapters,
    write_adapters,
)
from ldm_train.interchange.adapter_layouts import LAYOUTS
from ldm_train.interchange.adapter_metadata import PUBLISHED
from ldm_train.interchange.adapter_names import diffusers_names, kohya_names, layers_of
from ldm_train.interchange.adapter_weights import Weighted, merged, place_of, unmerged
from tests.conftest import composed

from .adapters import SMALL_BASE, assert_same_adapters, random_adapters
from .models import random_text_encoder
from .unets import SMALL_UNET

METADATA = AdapterMetadata(SMALL_BASE, "0123abcd", ("sks dog", "red"), {"ss_training_comment": "hello"})
CROSS = r"unet\..*cross_attention\.to_[kv]"
SELF = r"unet\..*self_attention\.to_.*"


def written(path: Path, layout="kohya", change=None, base=SMALL_BASE, **kind):
    """A file whose tensors were changed afterwards."""
    kind = {"chosen": r"unet\..*_attention\.to_.*"} | kind
    write_adapters(path, random_adapters(base, **kind), AdapterMetadata(base), layout)
    if change is not None:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=header)
    return path


def of_others(path: Path, header=None):
    """The same file without our record."""
    save_file(load_file(path), path, metadata=header)
    return path


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_identity(layout, dora, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    adapters = random_adapters(ranks=(4, 1, 2), alphas=(1.0, 0.5, 0.1), dora=dora)
    write_adapters(path, adapters, METADATA, layout)
    found = read_adapters(path)
    assert_same_adapters(found.adapters, adapters, 1e-6)
    for key, adapter in adapters.items():
        assert torch.equal(found.adapters[key].down, adapter.down)
        assert torch.equal(found.adapters[key].up, adapter.up)
        assert found.adapters[key].alpha == pytest.approx(adapter.alpha, rel=0 if layout == "ours" else 1e-6)
    assert (found.layout, found.assumed_scales) == (layout, 0)
    assert (found.metadata.base, found.metadata.base_digest) == (SMALL_BASE, "0123abcd")
    assert found.metadata.trigger_words == ("sks dog", "red")
    assert found.metadata.notes["ss_training_comment"] == "hello"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_layer_has_one_name_in_every_layout():
    """In kohya's too, where names without dots might have met."""
    for base in (*PUBLISHED.values(), SMALL_BASE):
        layers = layers_of(base)
        for vocabulary in (kohya_names(layers), diffusers_names(layers)):
            assert len(set(vocabulary.written.values())) == len(layers) == len(vocabulary.written)
            assert all(vocabulary.read[name] == key for key, name in vocabulary.written.items())


def test_the_names_are_those_of_the_published_files():
    layers = layers_of(PUBLISHED["sd1"])
    key = "unet.down.0.blocks.0.transformer.blocks.0.self_attention.to_out"
    text = "text_encoder.transformer.resblocks.11.mlp.c_fc"
    kohya, diffusers = kohya_names(layers).written, diffusers_names(layers).written
    assert kohya[key] == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert kohya[text] == "lora_te_text_model_encoder_layers_11_mlp_fc1"
    assert diffusers[key] == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert diffusers[text] == "text_encoder.text_model.encoder.layers.11.mlp.fc1"


@pytest.mark.parametrize(("option", "ndim"), [("sd1", 4), ("sd2", 2)])
def test_kohyas_alpha_and_the_shapes_of_its_projections(option, ndim, tmp_path):
    path = written(tmp_path / "a.safetensors", base=PUBLISHED[option], chosen=r"unet\..*project_in", alphas=(0.25,))
    tensors = load_file(path)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert tensors[f"{name}.alpha"] == 1.0
    assert tensors[f"{name}.lora_down.weight"].ndim == ndim
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "1.0")
    assert header["ss_base_model_version"] == f"sd_v{option[-1]}"


def test_the_published_models_are_those_of_the_options():
    for option, base in PUBLISHED.items():
        fixed = [f"++unet.{key}={base.unet[key]}" for key in ("context_dim", "vector_dim") if key in base.unet]
        assert (conf_dir() / "unet" / f"{option}.yaml").is_file()
        cfg = composed(f"unet={option}", "autoencoder=kl_f8", *fixed)
        node = {**cfg.unet, "channel_multipliers": [*cfg.unet.channel_multipliers]}
        node |= {"attention_factors": [*cfg.unet.attention_factors], "checkpoint_factors": []}
        node |= {"transformer_depth": [*cfg.unet.transformer_depth]} if "transformer_depth" in cfg.unet else {}
        assert UNetArchitecture.of(node) == UNetArchitecture.of(base.unet)


class TestRecognition:
    """Of files that say nothing of their architecture."""

    @pytest.mark.parametrize("layout", ["kohya", "diffusers"])
    @pytest.mark.parametrize(("option", "chosen"), [("sd1", CROSS), ("sd2", CROSS), ("sdxl", SELF), ("sdxl", CROSS)])
    def test_stable_diffusion_is_recognised(self, option, chosen, layout, tmp_path):
        path = of_others(written(tmp_path / "a.safetensors", layout, base=PUBLISHED[option], chosen=chosen, ranks=(1,)))
        assert read_adapters(path).metadata.base == PUBLISHED[option]

    def test_a_text_encoder_alone_tells_by_its_width(self, tmp_path):
        base = PUBLISHED["sd2"]
        path = of_others(written(tmp_path / "a.safetensors", base=base, chosen=r"text_encoder\..*", ranks=(1,)))
        assert read_adapters(path).metadata.base == base

    def test_what_fits_two_is_refused_unless_the_file_says_which(self, tmp_path):
        path = of_others(written(tmp_path / "a.safetensors", base=PUBLISHED["sd2"], chosen=SELF, ranks=(1,)))
        with pytest.raises(ValueError, match=r"fit sd1 and sd2 alike.*--unet"):
            read_adapters(path)
        of_others(path, {"ss_base_model_version": "sd_v2_v"})
        assert read_adapters(path).metadata.base == PUBLISHED["sd2"]
        assert read_adapters(path, PUBLISHED["sd1"]).metadata.base == PUBLISHED["sd1"]

    def test_another_architecture_is_refused_with_the_closest(self, tmp_path):
        path = of_others(written(tmp_path / "a.safetensors"))
        with pytest.raises(ValueError, match=r"says no architecture.*do not fit.*--unet"):
            read_adapters(path)
        assert len(read_adapters(path, SMALL_BASE).adapters) == 56

    def test_published_names_of_stable_diffusion_xl_are_read(self, tmp_path):
        """Kohya trains XL under these; the same tensors, another vocabulary."""
        base = PUBLISHED["sdxl"]
        adapters = random_adapters(base, r"unet\.down\.1\..*(to_.*|embed|conv_in|project_in)", ranks=(1,))
        layers = {layer.key: layer for layer in layers_of(base)}
        tensors = {}
        for key, adapter in adapters.items():
            published = next(name for name in layers[key].others if "blocks." in name)
            name = f"lora_unet_{published}".replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": adapter.down, f"{name}.lora_up.weight": adapter.up}
        assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
        save_file(tensors, tmp_path / "a.safetensors")
        found = read_adapters(tmp_path / "a.safetensors")
        assert_same_adapters(found.adapters, adapters)
        assert found.assumed_scales == len(adapters)


def test_a_missing_alpha_is_the_rank_and_is_counted(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.endswith(".alpha")][:3]:
            del tensors[name]

    found = read_adapters(written(tmp_path / "a.safetensors", change=drop, alphas=(0.5,)))
    assert found.assumed_scales == 3
    assert sorted(adapter.alpha for adapter in found.adapters.values())[-4:] == [0.5, 1.0, 1.0, 1.0]


def first(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def _longer(tensors):
    tensors[first(tensors, ".lora_down.weight")] = torch.ones(4, 99)


def _stranger(tensors):
    for part in ("lora_down", "lora_up"):
        tensors[f"lora_unet_down_blocks_9_to_q.{part}.weight"] = torch.ones(2, 2)


def _half(tensors):
    del tensors[first(tensors, ".lora_up.weight")]


def _infinite(tensors):
    tensors[first(tensors, ".lora_up.weight")][0, 0] = math.inf


def _other_rank(tensors):
    name = first(tensors, ".lora_up.weight")
    tensors[name] = tensors[name][:, :2].contiguous()


def _lohas(tensors):
    tensors["lora_unet_conv_in.hada_w1_a"] = torch.ones(2, 2)


def _lokrs(tensors):
    tensors["lora_unet_conv_in.lokr_w1"] = torch.ones(2, 2)


def _tucker(tensors):
    tensors["lora_unet_conv_in.lora_mid.weight"] = torch.ones(2, 2)


def _bias(tensors):
    tensors["lora_unet_conv_in.diff_b"] = torch.ones(2)


def _alphas(tensors):
    tensors[first(tensors, ".alpha")] = torch.ones(2)


def _by_input(tensors):
    name = first(tensors, ".lora_down.weight")
    tensors[name.replace("lora_down.weight", "dora_scale")] = torch.ones(1, tensors[name].shape[1])


REFUSED = {
    "another shape": (_longer, r"1 of 56 adapters are of other shapes.*the layer's is.*--unet"),
    "unknown layer": (_stranger, r"1 of 57 adapted layers are none of the base model \(lora_unet_down_blocks_9_to_q\)"),
    "half of a pair": (_half, r"incomplete \(lora_unet.* lacks its B \(up\)\); allowed are pairs"),
    "infinite": (_infinite, r"1 tensors hold values that are not finite"),
    "another rank": (_other_rank, r"A is .* and its B .*; allowed are"),
    "LoHa": (_lohas, r"parts of LoHa.*hada_w1_a; allowed are"),
    "LoKr": (_lokrs, r"parts of LoKr"),
    "Tucker": (_tucker, r"Tucker"),
    "a bias": (_bias, r"1 tensors are no parts of adapters \(lora_unet_conv_in.diff_b\)"),
    "two alphas": (_alphas, r"alpha of .* has the shape \(2,\)"),
    "a magnitude by input": (_by_input, r"one length for each of the \d+ outputs"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refusal:
        read_adapters(written(tmp_path / "a.safetensors", change=change))
    assert str(tmp_path / "a.safetensors") in str(refusal.value)
    assert "allowed" in str(refusal.value)


def test_another_base_model_is_refused_with_the_first_of_the_differences(tmp_path):
    path = written(tmp_path / "a.safetensors", base=PUBLISHED["sd1"], chosen=CROSS, ranks=(1,))
    with pytest.raises(ValueError, match=r"32 of 32 adapters are of other shapes.*and 28 more"):
        read_adapters(path, PUBLISHED["sd2"])


class TestDamage:
    def test_a_truncated_file(self, tmp_path):
        path = written(tmp_path / "a.safetensors")
        for length in (4, 200, path.stat().st_size - 7):
            (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:length])
            with pytest.raises(ValueError, match=r"cut\.safetensors.*allowed is a complete safetensors file"):
                read_adapters(tmp_path / "cut.safetensors")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="allowed are"):
            read_adapters(tmp_path / "none.safetensors")

    def test_a_folder_without_adapters(self, tmp_path):
        with pytest.raises(ValueError, match="holds no adapters; allowed"):
            read_adapters(tmp_path)

    def test_a_file_of_something_else(self, tmp_path):
        save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"none of 1 tensors has an adapter's name \(weight\); allowed"):
            read_adapters(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
    def test_pickled_tensors_are_read_and_pickled_code_is_not_run(self, suffix, tmp_path):
        adapters = read_adapters(written(tmp_path / "a.safetensors")).adapters
        path = tmp_path / f"a{suffix}"
        torch.save(load_file(tmp_path / "a.safetensors"), path)
        assert_same_adapters(read_adapters(path, SMALL_BASE).adapters, adapters)
        torch.save({"lora_unet_conv_in.lora_down.weight": _Trap(tmp_path / "sprung")}, path)
        with pytest.raises(ValueError, match="allowed are complete files of plain tensors"):
            read_adapters(path, SMALL_BASE)
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ("{", "damaged"),
            (json.dumps({"adapters": {"version": 99}}), "version 99; allowed is 1"),
            (json.dumps({"adapters": {"version": 1}}), "damaged"),
            (json.dumps({"adapters": {"version": 1, "unet": {"_target_": "os.system"}}}), "_target_"),
            (json.dumps({"adapters": {"version": 1, "unet": SMALL_UNET, "text_encoder": {"width": 1}}}), "damaged"),
        ],
    )
    def test_a_damaged_record(self, record, message, tmp_path):
        path = of_others(written(tmp_path / "a.safetensors", "ours"), {"ldm_train": record})
        with pytest.raises(ValueError, match=message):
            read_adapters(path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ("[1]", "allowed is a dictionary"),
            ("{", "allowed is JSON"),
            ('{"unet.lora_alpha": "four"}', "allowed is a finite number"),
            ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 2}}', "alpha_pattern"),
        ],
    )
    def test_damaged_settings_of_peft(self, settings, message, tmp_path):
        path = of_others(written(tmp_path / "a.safetensors", "diffusers"), {"lora_adapter_metadata": settings})
        with pytest.raises(ValueError, match=message):
            read_adapters(path, SMALL_BASE)


class _Trap:
    """Whoever unpickles it, writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestWriting:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layout": "onnx"}, "no layout 'onnx'; allowed are ours, kohya, diffusers"),
            ({"path": "a.ckpt"}, "allowed is a name in .safetensors"),
            ({"layout": "diffusers", "mixed": True}, "diffusers knows DoRA of all layers of a part or of none"),
            ({"dtype": torch.float16, "large": True}, "not finite"),
        ],
    )
    def test_the_impossible_is_refused_and_leaves_nothing(self, options, message, tmp_path):
        adapters = random_adapters(chosen=SELF)
        key = next(iter(adapters))
        if options.pop("mixed", False):
            adapters |= random_adapters(chosen=re.escape(key), dora=True)
        if options.pop("large", False):
            adapters[key].up.mul_(1e9)
        with pytest.raises(ValueError, match=message):
            write_adapters(tmp_path / options.pop("path", "a.safetensors"), adapters, METADATA, **options)
        assert list(tmp_path.iterdir()) == []

    def test_adapters_of_another_architecture_are_refused(self, tmp_path):
        other = AdapterBase(SMALL_UNET | {"context_dim": 16}, TextShape(1, 24))
        with pytest.raises(ValueError, match="are none of the base model"):
            write_adapters(tmp_path / "a.safetensors", random_adapters(), AdapterMetadata(other))
        with pytest.raises(ValueError, match="are of other shapes"):
            write_adapters(tmp_path / "a.safetensors", random_adapters(chosen=CROSS), AdapterMetadata(other))


class TestWeights:
    """Adapters in a state dict."""

    def test_every_layer_has_its_weight(self):
        with torch.device("meta"):
            unet = build_unet(SMALL_UNET).state_dict()
        states = {"unet.": unet, "text_encoder.": random_text_encoder().tensors}
        for layer in layers_of(SMALL_BASE):
            state = states[layer.key[: layer.key.index(".") + 1]]
            assert tuple(place_of(layer.key).of(state).shape) == layer.weight_shape

    def test_one_of_three_fused_projections_is_changed_alone(self):
        state = random_text_encoder().tensors
        adapters = random_adapters(chosen=r"text_encoder\..*\.0\.attn\.k_proj")
        result = merged(state, "text_encoder.", [Weighted(adapters, 2.0)])
        name = "transformer.resblocks.0.attn.in_proj_weight"
        difference = (result[name] - state[name]).chunk(3)
        (adapter,) = adapters.values()
        torch.testing.assert_close(difference[1], 2 * adapter.delta(), rtol=1e-4, atol=1e-6)
        assert not difference[0].any()
        assert not difference[2].any()
        assert all(result[other] is state[other] for other in state if other != name)

    def test_dora_cannot_be_taken_out(self):
        sets = [Weighted(random_adapters(chosen=SELF, dora=True), 1.0)]
        with pytest.raises(ValueError, match="have a magnitude"):
            unmerged({}, "unet.", sets)


def test_the_header_names_no_place_for_code(tmp_path):
    """A file of ours is JSON and numbers: its first bytes are the length of the header."""
    path = written(tmp_path / "a.safetensors", "ours")
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header["__metadata__"]["ldm_train"])["adapters"]["version"] == 1
