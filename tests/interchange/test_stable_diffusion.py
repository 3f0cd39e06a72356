from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_train.conditioning import CLIPTextEncoder
from ldm_train.interchange import Architecture, UNetArchitecture, export_stable_diffusion, import_stable_diffusion
from ldm_train.interchange.compvis import COMPVIS, RECORD
from ldm_train.interchange.latents import SCALE_FACTOR, scaled
from ldm_train.interchange.layout import OURS as OURS_AUTOENCODER
from ldm_train.interchange.layout import names
from ldm_train.interchange.model import DiffusionModel, Part, TextEncoder
from ldm_train.interchange.stable_diffusion import is_whole, widths_of
from ldm_train.interchange.unet_layout import OURS, unet_names

from .models import SCHEDULE, TOWERS, random_model
from .networks import KINDS, SMALL, learned, random_autoencoder, same
from .unets import PLAIN_UNET, SD1, SMALL_UNET

MODELS = {
    "stable diffusion 1": {},
    "stable diffusion 2": {
        "unet": SMALL_UNET | {"num_heads": None, "head_channels": 8, "linear_projection": True},
        "text": "openclip",
        "prediction": "v",
    },
    "inpainting": {"unet": SMALL_UNET | {"concat_channels": 5}, "averaged": False},
    "unconditional": {"unet": PLAIN_UNET, "autoencoder": KINDS["vq"], "text": None},
}


def assert_same(found, model):
    assert same(found.unet.state, model.unet.state)
    assert (found.average is None) == (model.average is None)
    if model.average is not None:
        assert same(found.average.state, model.average.state)
        assert found.average[1:] == model.average[1:]
    assert same(learned_of(found), learned_of(model))
    assert (found.text_encoder is None) == (model.text_encoder is None)
    if model.text_encoder is not None:
        assert same(found.text_encoder.tensors, model.text_encoder.tensors)
        assert found.text_encoder.settings() == model.text_encoder.settings()
    assert (found.schedule, found.prediction) == (model.schedule, model.prediction)


def learned_of(model):
    """The autoencoder's state without a codebook's counters, which only our own checkpoints hold."""
    kept = learned(random_autoencoder(model.autoencoder.node))
    return {name: value for name, value in model.autoencoder.state.items() if name in kept}


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)
def test_export_then_import_is_the_identity(kind):
    model = random_model(**kind)
    tensors, record = export_stable_diffusion(model)
    nodes = (model.unet.node, model.autoencoder.node)
    found = import_stable_diffusion({"state_dict": tensors, RECORD: record}, *nodes)
    assert_same(found, model)
    assert found.ignored == {}


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)
def test_import_then_export_is_the_identity_without_our_record(kind):
    """A file of others: nothing but its tensors comes in, and all of them come out again."""
    model = random_model(**kind)
    tensors, _ = export_stable_diffusion(model)
    found = import_stable_diffusion(tensors, model.unet.node, model.autoencoder.node)
    again, _ = export_stable_diffusion(found)
    assert same(again, tensors)


def meta_model():
    """Stable Diffusion 1 in its real size, without memory."""
    vae = SMALL | {"channels": 128, "channel_multipliers": [1, 2, 4, 4], "num_res_blocks": 2, "norm_groups": 32}
    with torch.device("meta"):
        network = {name: torch.zeros(1) for name in unet_names(OURS, UNetArchitecture.of(SD1))}
        autoencoder = {name: torch.zeros(1) for name in names(OURS_AUTOENCODER, Architecture.of(vae))}
        tower = CLIPTextEncoder(768, 12, 12, "quick_gelu").tower.state_dict()
    settings = {"num_layers": 12, "num_heads": 12, "activation": "quick_gelu", "layer": "last"}
    average = random_model().average._replace(state=network)
    text = TextEncoder(tower, **settings)
    latents = scaled(SCALE_FACTOR, 4)
    return DiffusionModel(Part(SD1, network), average, Part(vae, autoencoder | latents), text, SCHEDULE, "epsilon", {})


def test_the_tensors_of_stable_diffusion_1_are_as_many_as_published():
    tensors, _ = export_stable_diffusion(meta_model())
    counts = {
        "model.diffusion_model.": 686,
        "model_ema.": 688,
        "first_stage_model.": 248,
        "cond_stage_model.transformer.text_model.": 196 + 1,
    }
    for prefix, count in counts.items():
        assert sum(name.startswith(prefix) for name in tensors) == count
    assert len(tensors) == sum(counts.values()) + 12
    assert "model_ema.diffusion_modelinput_blocks00weight" in tensors
    assert {"model_ema.decay", "model_ema.num_updates", "betas", "posterior_mean_coef2"} <= tensors.keys()
    position_ids = tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert torch.equal(position_ids, torch.arange(77)[None])
    first_stage = {
        f"first_stage_model.{name}" for name in names(COMPVIS, Architecture.of(meta_model().autoencoder.node))
    }
    assert first_stage <= tensors.keys()


def test_every_average_has_a_name_of_its_own():
    tensors, _ = export_stable_diffusion(random_model(SMALL_UNET | {"num_res_blocks": 2}))
    network = [name for name in tensors if name.startswith("model.diffusion_model.")]
    dotless = {"model_ema." + name.removeprefix("model.").replace(".", "") for name in network}
    assert len(dotless) == len(network)
    assert dotless <= tensors.keys()


def test_openclip_s_names_are_those_that_diffusers_expects():
    """Diffusers' converter of Stable Diffusion 2 finds the same text encoder under transformers' names."""
    model = random_model(**MODELS["stable diffusion 2"])
    tensors, _ = export_stable_diffusion(model)
    assert "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight" in tensors
    config = CLIPTextConfig(hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3)
    theirs = convert_open_clip_checkpoint(CLIPTextModel(config), dict(tensors), prefix="cond_stage_model.model.")
    published = {f"{name}": value for name, value in theirs.items()}
    weight = next(value for name, value in published.items() if name.endswith("layers.1.self_attn.v_proj.weight"))
    fused = model.text_encoder.tensors["transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(weight, fused[48:])


class TestLatentsOfOneScale:
    def factor(self, std):
        model = random_model()
        state = model.autoencoder.state | scaled(1 / std, 4)
        return export_stable_diffusion(replace(model, autoencoder=Part(SMALL, state)))[0].get("scale_factor")

    def test_it_is_written_where_no_config_says_it(self):
        assert float(self.factor(4.0)) == 0.25

    def test_that_of_stable_diffusion_is_in_none_of_its_files(self):
        assert self.factor(1 / SCALE_FACTOR) is None

    def test_statistics_of_channels_have_no_place_but_the_record(self):
        model = random_model()
        state = model.autoencoder.state | {"latent_std": torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)}
        model = replace(model, autoencoder=Part(SMALL, state))
        tensors, record = export_stable_diffusion(model)
        assert "scale_factor" not in tensors
        found = import_stable_diffusion({"state_dict": tensors, RECORD: record}, SMALL_UNET, SMALL)
        assert same(found.autoencoder.state, state)


def test_what_the_layout_does_not_know_is_counted():
    tensors, _ = export_stable_diffusion(random_model(text=None))
    strange = dict.fromkeys(["cond_stage_model.embedding.weight", "lvlb_weights"], torch.zeros(1))
    found = import_stable_diffusion(tensors | strange, SMALL_UNET, SMALL)
    assert found.ignored == {"cond_stage_model": 1, "lvlb_weights": 1}


def test_betas_of_no_named_schedule_leave_it_unknown():
    tensors, _ = export_stable_diffusion(random_model())
    found = import_stable_diffusion(tensors | {"betas": tensors["betas"] ** 1.1}, SMALL_UNET, SMALL)
    assert found.schedule is None
    with pytest.raises(ValueError, match=r"schedule of the model is unknown; allowed .*; name it with --schedule"):
        export_stable_diffusion(found)


def test_the_widths_of_a_published_file():
    node = SMALL_UNET | {"concat_channels": 5, "vector_dim": 20, "out_channels": 8}
    tensors, _ = export_stable_diffusion(random_model(node))
    assert widths_of(tensors) == (32, 9, 8, 24, 20)
    assert is_whole(tensors)
    plain, _ = export_stable_diffusion(random_model(PLAIN_UNET, text=None))
    assert widths_of(plain) == (32, 4, 4, None, None)
    with pytest.raises(ValueError, match=r"holds no model.diffusion_model.input_blocks.0.0.weight; allowed"):
        widths_of({})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "model_ema.diffusion_modelout2bias",
            None,
            r"1 averaged tensors are missing or unknown, .*diffusion_modelout2b",
        ),
        (
            "model_ema.diffusion_modelnew",
            torch.zeros(1),
            r"1 averaged tensors are missing or unknown, .*modelnew; allowed",
        ),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            None,
            r"1 tensors of the text encoder are missing or unknown, among them ln_final.bias; allowed",
        ),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.new.weight",
            torch.zeros(1),
            r"1 tensors of the text encoder are missing or unknown, .*new.weight; allowed",
        ),
    ],
)
def test_incomplete_parts_are_refused(name, value, message):
    tensors, _ = export_stable_diffusion(random_model())
    changed = {key: kept for key, kept in (tensors | {name: value}).items() if kept is not None}
    with pytest.raises(ValueError, match=message):
        import_stable_diffusion(changed, SMALL_UNET, SMALL)


def test_strangers_in_the_u_net_stay_for_the_strict_comparison():
    tensors, _ = export_stable_diffusion(random_model())
    strange = {"model.diffusion_model.control.weight": torch.zeros(1)}
    assert "control.weight" in import_stable_diffusion(tensors | strange, SMALL_UNET, SMALL).unet.state


def test_transformers_without_context_have_no_published_layout():
    model = random_model(SMALL_UNET | {"context_dim": None}, text=None)
    with pytest.raises(ValueError, match=r"have no context; the published layout .*; change `unet.attention`"):
        export_stable_diffusion(model)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(
        ValueError, match=r"the prediction is 'score'; allowed are epsilon, v, x_0; change --prediction"
    ):
        random_model(prediction="score")


def test_settings_that_no_tensor_tells_are_guessed_as_published():
    """64 channels a head; the last layer of OpenAI's, the last but one of OpenCLIP's."""
    model = random_model(text="openclip")
    text = TextEncoder.of(model.text_encoder.tensors, None, is_openai=False)
    assert text.settings() == TOWERS["openclip"] | {"num_heads": 1}
    assert TextEncoder.of(text.tensors, None, is_openai=True).settings()["layer"] == "last"
