"""Adapters in diffusers' and peft's own classes do what they do in our weights, out of the files that both read."""

import json
import re

import diffusers
import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_train.interchange import (
    AdapterBase,
    AdapterMetadata,
    export_diffusers_unet,
    read_adapters,
    write_adapters,
)
from ldm_train.interchange.adapter_files import PEFT_CONFIG
from ldm_train.interchange.adapter_layouts import LAYOUTS
from ldm_train.interchange.adapter_metadata import PUBLISHED
from ldm_train.interchange.adapter_names import layers_of
from ldm_train.interchange.adapter_weights import Weighted, merged, unmerged
from ldm_train.interchange.clip import from_open_clip
from ldm_train.nn.low_rank import LowRank

from .adapters import SMALL_BASE, assert_same_adapters, random_adapters, with_adapters
from .models import TOWERS, encoder_of, random_text_encoder
from .test_unet_diffusers import predicted, theirs
from .unets import SMALL_UNET, inputs, random_unet

ATTENTION = r"unet\..*_attention\.to_.*"
EVERYTHING = r"unet\..*"
ONE_ALPHA = {
    "attention": {"chosen": ATTENTION},
    "attention, one scale": {"chosen": ATTENTION, "alphas": (0.3,)},
    "every layer, ranks of one network alpha": {"chosen": EVERYTHING, "ranks": (4, 1, 2), "alphas": (0.25, 1, 0.5)},
}
KINDS = ONE_ALPHA | {
    "attention, one rank and many scales": {"chosen": ATTENTION, "alphas": (1.0, 0.25, 2.0)},
    "attention, ranks and scales": {"chosen": ATTENTION, "ranks": (4, 1, 8), "alphas": (1.0, 0.25, 2.0)},
    "every layer": {"chosen": EVERYTHING, "ranks": (3, 2), "alphas": (0.5, 0.2, 0.1)},
}
LINEAR_UNET = SMALL_UNET | {"linear_projection": True}


def of_diffusers(unet, node):
    """The same U-Net in diffusers' class, with tensors of its own."""
    config, tensors = export_diffusers_unet(node, {name: value.clone() for name, value in unet.state_dict().items()})
    return theirs(json.loads(json.dumps(config)), tensors)


def load(model, path, name="first"):
    """What `load_lora_weights` of a pipeline does with a file and the U-Net."""
    state, alphas, metadata = Loader.lora_state_dict(str(path), unet_config=model.config, return_lora_metadata=True)
    Loader.load_lora_into_unet(state, alphas, model, adapter_name=name, metadata=metadata)


def assert_equal(found, expected, base):
    """Equal predictions, which differ from those of the base model."""
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((expected - base).norm() / base.norm()) > 1e-3, "equal because the adapters do nothing"


@pytest.fixture(scope="module", params=[SMALL_UNET, LINEAR_UNET], ids=["convolutions", "linear projections"])
def model(request):
    """A node, our U-Net of it, its inputs and its prediction."""
    unet, arguments = random_unet(request.param), inputs(request.param)
    with torch.no_grad():
        return request.param, unet, arguments, unet(*arguments)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for layout, kinds in (("diffusers", KINDS), ("kohya", ONE_ALPHA)) for kind in kinds],
)
@torch.no_grad()
def test_diffusers_predicts_what_the_merged_weights_do(kind, layout, model, tmp_path):
    node, unet, arguments, before = model
    base = AdapterBase(node)
    adapters = random_adapters(base, **KINDS[kind])
    write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(base), layout)
    assert_same_adapters(read_adapters(tmp_path / "a.safetensors").adapters, adapters, 1e-6)
    found = of_diffusers(unet, node)
    load(found, tmp_path / "a.safetensors")
    assert_equal(predicted(found, *arguments), with_adapters(unet, (adapters, 1.0))(*arguments), before)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@torch.no_grad()
@pytest.mark.thorough
def test_diffusers_reads_every_single_layer_of_either_layout(layout, tmp_path):
    """One file for each layer: no name is mistaken, and no scale. Kohya's names have lost their dots."""
    base = AdapterBase(SMALL_UNET)
    unet, path = random_unet(SMALL_UNET), tmp_path / "a.safetensors"
    found = of_diffusers(unet, SMALL_UNET)
    for layer in layers_of(base):
        adapters = random_adapters(base, re.escape(layer.key), alphas=(0.7,))
        write_adapters(path, adapters, AdapterMetadata(base), layout)
        load(found, path)
        adapted = found.get_submodule(layer.module)
        wanted = adapters[layer.key].delta()
        assert float((adapted.get_delta_weight("first") - wanted).norm() / wanted.norm()) < 1e-6, layer.module
        found.unload_lora()


def test_diffusers_takes_one_alpha_for_all_attentions_of_kohyas_files(tmp_path):
    """Every other layer has its own, and both have it in diffusers' own layout."""
    base = AdapterBase(SMALL_UNET)
    adapters = random_adapters(base, EVERYTHING, alphas=(1.0, 1.0, 1.0, 0.5))
    found = of_diffusers(random_unet(SMALL_UNET), SMALL_UNET)
    for layout in ("kohya", "diffusers"):
        write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(base), layout)
        assert_same_adapters(read_adapters(tmp_path / "a.safetensors").adapters, adapters, 1e-6)
        load(found, tmp_path / "a.safetensors")
        for layer in layers_of(base):
            is_mistaken = layout == "kohya" and ".attn" in layer.module
            expected = 1.0 if is_mistaken else adapters[layer.key].alpha
            assert found.get_submodule(layer.module).scaling["first"] == expected, layer.module
        found.unload_lora()


@torch.no_grad()
def test_kohyas_name_of_the_class_embedding_is_mistaken_by_diffusers(tmp_path):
    """A vector joins the time embedding there; diffusers 0.42 writes dots where the name had underscores."""
    node = SMALL_UNET | {"vector_dim": 20}
    base = AdapterBase(node)
    adapters = random_adapters(base, r"unet\.vector_embedding\..*")
    assert adapters
    found = of_diffusers(random_unet(node), node)
    write_adapters(tmp_path / "kohya.safetensors", adapters, AdapterMetadata(base), "kohya")
    with pytest.raises(ValueError, match="class"):
        load(found, tmp_path / "kohya.safetensors")
    write_adapters(tmp_path / "diffusers.safetensors", adapters, AdapterMetadata(base), "diffusers")
    load(found, tmp_path / "diffusers.safetensors")
    for layout in ("kohya", "diffusers"):
        assert_same_adapters(read_adapters(tmp_path / f"{layout}.safetensors").adapters, adapters, 1e-6)


@pytest.mark.parametrize("chosen", [ATTENTION, EVERYTHING], ids=["attention", "every layer"])
@torch.no_grad()
def test_dora_of_diffusers_is_ours(chosen, model, tmp_path):
    node, unet, arguments, before = model
    base = AdapterBase(node)
    adapters = random_adapters(base, chosen, ranks=(4, 2), alphas=(1.0, 0.5), dora=True)
    write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(base), "diffusers")
    assert_same_adapters(read_adapters(tmp_path / "a.safetensors").adapters, adapters, 1e-6)
    found = of_diffusers(unet, node)
    load(found, tmp_path / "a.safetensors")
    assert_equal(predicted(found, *arguments), with_adapters(unet, (adapters, 1.0))(*arguments), before)


@torch.no_grad()
def test_diffusers_leaves_the_magnitudes_of_kohyas_files_out(tmp_path):
    """It says so in its log, and applies what is left; we read them."""
    base = AdapterBase(SMALL_UNET)
    adapters = random_adapters(base, ATTENTION, dora=True)
    write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(base), "kohya")
    assert_same_adapters(read_adapters(tmp_path / "a.safetensors").adapters, adapters, 1e-6)
    unet, arguments = random_unet(SMALL_UNET), inputs(SMALL_UNET)
    found = of_diffusers(unet, SMALL_UNET)
    load(found, tmp_path / "a.safetensors")
    without = {key: LowRank(adapter.down, adapter.up, adapter.alpha) for key, adapter in adapters.items()}
    assert_equal(predicted(found, *arguments), with_adapters(unet, (without, 1.0))(*arguments), unet(*arguments))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_two_adapters_with_weights_add_up_as_they_do_there(dora, model, tmp_path):
    node, unet, arguments, before = model
    base = AdapterBase(node)
    first = random_adapters(base, ATTENTION, alphas=(0.5, 1.0), dora=dora)
    second = random_adapters(base, r"unet\.(down|up)\..*_attention\.to_[kv]|unet\.conv_in", ranks=(2,), seed=1)
    found = of_diffusers(unet, node)
    for name, adapters, layout in (("first", first, "diffusers"), ("second", second, "kohya")):
        write_adapters(tmp_path / f"{name}.safetensors", adapters, AdapterMetadata(base), layout)
        load(found, tmp_path / f"{name}.safetensors", name)
    found.set_adapters(["first", "second"], [0.8, -0.4])
    expected = with_adapters(unet, (first, 0.8), (second, -0.4))(*arguments)
    if dora:  # peft scales A and B of DoRA, and not the whole change
        first = {key: LowRank(a.down, a.up, 0.8 * a.alpha, a.magnitude) for key, a in first.items()}
        expected = with_adapters(unet, (first, 1.0), (second, -0.4))(*arguments)
    assert_equal(predicted(found, *arguments), expected, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_half_of_the_precision_costs_its_rounding_alone(layout, dtype, tmp_path):
    base = AdapterBase(SMALL_UNET)
    adapters = random_adapters(base, EVERYTHING, ranks=(3, 5), alphas=(0.5, 0.3))
    write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(base), layout, dtype)
    found = read_adapters(tmp_path / "a.safetensors").adapters
    rounded = {key: adapter.to(dtype) for key, adapter in adapters.items()}
    assert_same_adapters(found, rounded, 1e-6)
    assert {adapter.down.dtype for adapter in found.values()} == {dtype}
    if layout != "ours":
        unet, arguments = random_unet(SMALL_UNET), inputs(SMALL_UNET)
        model = of_diffusers(unet, SMALL_UNET)
        load(model, tmp_path / "a.safetensors")
        model.float()
        assert_equal(predicted(model, *arguments), with_adapters(unet, (rounded, 1.0))(*arguments), unet(*arguments))


@torch.no_grad()
def test_merging_and_taking_out_again_leaves_the_prediction(model):
    node, unet, arguments, before = model
    sets = [
        Weighted(random_adapters(AdapterBase(node), EVERYTHING, alphas=(0.7,)), 0.8),
        Weighted(random_adapters(AdapterBase(node), ATTENTION, seed=1), -0.5),
    ]
    state = merged(unet.state_dict(), "unet.", sets)
    back = unmerged(state, "unet.", sets)
    again = random_unet(node)
    again.load_state_dict(state)
    assert float((again(*arguments) - before).norm() / before.norm()) > 1e-2
    again.load_state_dict(back)
    assert float((again(*arguments) - before).norm() / before.norm()) < 1e-5


class TestFilesOfOthers:
    """What diffusers and peft write themselves."""

    @torch.no_grad()
    def test_a_unet_that_diffusers_saved(self, tmp_path):
        """`save_lora_adapter`: without the part's prefix, with the settings in the header."""
        base = AdapterBase(SMALL_UNET)
        adapters = random_adapters(base, EVERYTHING, ranks=(3, 2), alphas=(0.5, 0.2, 0.1))
        write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(base), "diffusers")
        model = of_diffusers(random_unet(SMALL_UNET), SMALL_UNET)
        load(model, tmp_path / "a.safetensors")
        model.save_lora_adapter(tmp_path / "saved", adapter_name="first")
        assert_same_adapters(read_adapters(tmp_path / "saved", base).adapters, adapters, 1e-6)

    @pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
    def test_a_folder_of_peft(self, options, tmp_path):
        base = AdapterBase(SMALL_UNET)
        unet = random_unet(SMALL_UNET)
        wrapped = peft.get_peft_model(
            of_diffusers(unet, SMALL_UNET),
            peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "to_out.0", "conv1"], **options),
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if "lora_B" in name or "magnitude" in name:
                    value += torch.rand(value.shape, generator=generator)
        wrapped.save_pretrained(tmp_path)
        assert (tmp_path / PEFT_CONFIG).is_file()
        found = read_adapters(tmp_path, base)
        scale = 3 / (2 if "use_rslora" in options else 4)
        assert {adapter.alpha for adapter in found.adapters.values()} == {scale}
        wrapped.eval()
        arguments = inputs(SMALL_UNET)
        with torch.no_grad():
            expected = with_adapters(unet, (found.adapters, 1.0))(*arguments)
            assert_equal(predicted(wrapped, *arguments), expected, unet(*arguments))

    @pytest.mark.parametrize("age", ["processor", "lora"])
    @torch.no_grad()
    def test_the_older_names_of_diffusers(self, age, tmp_path):
        """Pickled, as they were at the time; diffusers itself reads the same."""
        base = AdapterBase(SMALL_UNET)
        adapters = random_adapters(base, ATTENTION)
        layers = {layer.key: layer for layer in layers_of(base)}
        tensors = {}
        for key, adapter in adapters.items():
            module = layers[key].processors[0] if age == "processor" else f"{layers[key].module}.lora"
            tensors |= {f"unet.{module}.down.weight": adapter.down, f"unet.{module}.up.weight": adapter.up}
        path = tmp_path / "pytorch_lora_weights.bin"
        torch.save(tensors, path)
        assert_same_adapters(read_adapters(path, base).adapters, adapters)
        unet, arguments = random_unet(SMALL_UNET), inputs(SMALL_UNET)
        model = of_diffusers(unet, SMALL_UNET)
        load(model, tmp_path)
        assert_equal(predicted(model, *arguments), with_adapters(unet, (adapters, 1.0))(*arguments), unet(*arguments))


class TestTextEncoders:
    @staticmethod
    def of_transformers(encoder):
        """The same tower in transformers' class."""
        settings, width = TOWERS["openai"], SMALL_BASE.text_encoder.width
        config = CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, max_position_embeddings=77,
            num_hidden_layers=settings["num_layers"], num_attention_heads=settings["num_heads"],
            hidden_act="quick_gelu",
        )  # fmt: skip
        model = CLIPTextModel(config).eval()
        state = from_open_clip(encoder.tower.state_dict(), settings["num_layers"])
        own = set(model.state_dict())
        renamed = {name if name in own else name.removeprefix("text_model."): value for name, value in state.items()}
        model.load_state_dict(renamed, strict=True)
        return model

    @pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
    @pytest.mark.parametrize("layout", ["diffusers", "kohya"])
    @torch.no_grad()
    def test_hidden_states_are_those_of_transformers(self, layout, dora, tmp_path):
        adapters = random_adapters(SMALL_BASE, r"text_encoder\..*", ranks=(4, 2, 1), alphas=(0.25, 0.5, 1.0), dora=dora)
        assert len(adapters) == 12
        write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(SMALL_BASE), layout)
        assert_same_adapters(read_adapters(tmp_path / "a.safetensors").adapters, adapters, 1e-6)
        if layout == "kohya":  # diffusers leaves the magnitudes of kohya's files out
            adapters = {key: LowRank(adapter.down, adapter.up, adapter.alpha) for key, adapter in adapters.items()}
        encoder = encoder_of(random_text_encoder())
        tokens = torch.randint(0, 49405, (2, 77), generator=torch.Generator().manual_seed(0))
        tokens[:, -1] = 49407
        model = self.of_transformers(encoder)
        before = model(tokens).last_hidden_state
        state, alphas, metadata = Loader.lora_state_dict(str(tmp_path / "a.safetensors"), return_lora_metadata=True)
        Loader.load_lora_into_text_encoder(state, alphas, model, prefix="text_encoder", metadata=metadata)
        encoder.tower.load_state_dict(merged(encoder.tower.state_dict(), "text_encoder.", [Weighted(adapters, 1.0)]))
        assert_equal(model(tokens).last_hidden_state, encoder(tokens), before)


@torch.no_grad()
def test_a_pipeline_loads_both_parts_of_a_file(tmp_path):
    """`load_lora_weights` and `set_adapters` of a whole pipeline."""
    encoder, unet = encoder_of(random_text_encoder()), random_unet(SMALL_UNET)
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=TestTextEncoders.of_transformers(encoder),
        tokenizer=None,
        unet=of_diffusers(unet, SMALL_UNET),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    adapters = random_adapters(SMALL_BASE, rf"{ATTENTION}|text_encoder\..*", ranks=(4, 2), alphas=(0.5, 1.0))
    write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(SMALL_BASE), "diffusers")
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="style")
    pipe.set_adapters("style", 0.6)
    sets, arguments = [Weighted(adapters, 0.6)], inputs(SMALL_UNET)
    expected = with_adapters(unet, *sets)(*arguments)
    assert_equal(predicted(pipe.unet, *arguments), expected, unet(*arguments))
    tokens = torch.randint(0, 49405, (2, 77), generator=torch.Generator().manual_seed(0))
    before = encoder(tokens)
    encoder.tower.load_state_dict(merged(encoder.tower.state_dict(), "text_encoder.", sets))
    assert_equal(pipe.text_encoder(tokens).last_hidden_state, encoder(tokens), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_attention_of_stable_diffusion_1_in_rank_4_has_the_published_size(layout, tmp_path):
    """The file of 3 MB that made adapters known; half of it in half of the precision."""
    base = PUBLISHED["sd1"]
    adapters = random_adapters(base, ATTENTION)
    parameters = sum(adapter.down.numel() + adapter.up.numel() for adapter in adapters.values())
    assert (len(adapters), parameters) == (128, 797_184)
    for dtype, megabytes in ((torch.float32, 3.23), (torch.float16, 1.63)):
        path = tmp_path / f"{dtype}.safetensors"
        write_adapters(path, adapters, AdapterMetadata(base), layout, dtype)
        assert path.stat().st_size / 1e6 == pytest.approx(megabytes, rel=0.02)
        assert len(load_file(path)) == (2 * 128 if layout == "diffusers" else 3 * 128)
