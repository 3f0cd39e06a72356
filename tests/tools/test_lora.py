"""`tools/lora.py`: models and adapters in files, by every command."""

import json
import re
from dataclasses import replace

import convert_model
import lora
import pytest
import torch
from convert_model import Source, read_model, write_model
from safetensors.torch import load_file, save_file

from ldm_train.checkpoint import digest
from ldm_train.interchange import AdapterMetadata, build_unet, read_adapters, write_adapters
from ldm_train.interchange.adapter_metadata import PUBLISHED
from ldm_train.interchange.model import Part
from ldm_train.nn.low_rank_algebra import singular_values
from tests.interchange.adapters import SMALL_BASE, assert_same_adapters, random_adapters, with_adapters
from tests.interchange.models import encoder_of, random_model
from tests.interchange.unets import SMALL_UNET, inputs, random_unet
from tests.tools.test_convert_model import DESCRIBED

ATTENTION = r".*(attention\.to_|attn\.|mlp\.).*"


def run(*arguments: object) -> None:
    assert lora.main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments: object) -> str:
    assert lora.main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def unet_of(model):
    unet = build_unet(SMALL_UNET).eval()
    unet.load_state_dict(model.unet.state if model.average is None else model.average.state)
    return unet


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A model without averages, written once."""
    path = tmp_path_factory.mktemp("model") / "base"
    write_model(path, "ldm_train", random_model(averaged=False))
    return path


@pytest.fixture
def files(tmp_path, base_model):
    """The model, and two sets of adapters for it."""
    (tmp_path / "base").symlink_to(base_model)
    sets = {
        "one": random_adapters(chosen=ATTENTION, alphas=(0.7, 0.3)),
        "two": random_adapters(chosen=r"unet\..*", ranks=(2,), seed=1),
    }
    own = digest(random_unet(SMALL_UNET))
    for name, words in (("one", ("sks",)), ("two", ("red", "sks"))):
        write_adapters(tmp_path / f"{name}.safetensors", sets[name], AdapterMetadata(SMALL_BASE, own, words))
    return tmp_path, sets


class TestMerging:
    @pytest.mark.parametrize("target", ["merged", "merged.safetensors", "folder"])
    @torch.no_grad()
    def test_the_merged_model_is_the_adapted_one_in_every_format(self, target, files):
        path, sets = files
        options = ["--to", "diffusers"] if target == "folder" else []
        given = [path / "one.safetensors", path / "two.safetensors", "--weight", 0.8, "--weight", "-0.5"]
        run("merge", path / "base", path / target, *given, *options)
        model, found_format = read_model(Source(path / target))
        assert found_format == {"merged": "ldm_train", "folder": "diffusers"}.get(target, "compvis")
        arguments = inputs(SMALL_UNET)
        expected = with_adapters(random_unet(SMALL_UNET), (sets["one"], 0.8), (sets["two"], -0.5))(*arguments)
        assert relative(unet_of(model)(*arguments), expected) < 1e-5
        before = read_model(Source(path / "base"))[0]
        tokens = torch.randint(0, 49405, (1, 77), generator=torch.Generator().manual_seed(0))
        changed, unchanged = encoder_of(model.text_encoder)(tokens), encoder_of(before.text_encoder)(tokens)
        assert relative(changed, unchanged) > 1e-2

    @torch.no_grad()
    def test_what_was_merged_is_taken_out(self, files):
        path, _ = files
        given = [path / "one.safetensors", path / "two.safetensors", "--weight", 0.8, "--weight", 1.5]
        run("merge", path / "base", path / "merged.safetensors", *given)
        run("unmerge", path / "merged.safetensors", path / "again", *given)
        first, again = (read_model(Source(path / name))[0] for name in ("base", "again"))
        arguments = inputs(SMALL_UNET)
        assert relative(unet_of(again)(*arguments), unet_of(first)(*arguments)) < 1e-5
        for name, value in first.text_encoder.tensors.items():
            torch.testing.assert_close(again.text_encoder.tensors[name], value, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("options", "seed"), [([], 1), (["--raw"], 0)])
    def test_the_averaged_weights_are_changed_unless_the_raw_ones_are_wanted(self, options, seed, files):
        path, sets = files
        write_model(path / "both", "ldm_train", random_model(averaged=True))
        run("merge", path / "both", path / "merged", path / "two.safetensors", *options)
        model = read_model(Source(path / "merged"))[0]
        assert model.average is None
        expected = with_adapters(random_unet(SMALL_UNET, seed), (sets["two"], 1.0)).state_dict()
        assert all(torch.equal(model.unet.state[name], value) for name, value in expected.items())

    def test_a_published_file_of_others_is_described(self, files):
        path, _ = files
        run("merge", path / "base", path / "published.safetensors", path / "two.safetensors", "--weight", 0)
        tensors = load_file(path / "published.safetensors")
        save_file(tensors, path / "published.safetensors")
        run("merge", path / "published.safetensors", path / "merged", path / "two.safetensors", *DESCRIBED)
        assert read_model(Source(path / "merged"))[0].unet.state.keys() == random_unet(SMALL_UNET).state_dict().keys()

    def test_adapters_of_other_weights_are_told_apart(self, files, capsys):
        path, _ = files
        write_model(path / "other", "ldm_train", random_model(averaged=True))
        run("merge", path / "base", path / "first", path / "two.safetensors")
        assert "another U-Net" not in " ".join(capsys.readouterr().err.split())
        run("merge", path / "other", path / "second", path / "two.safetensors")
        assert "two.safetensors was trained on another U-Net (sha256" in " ".join(capsys.readouterr().err.split())

    def test_a_base_in_half_of_the_precision_is_the_same_unet(self, files, capsys):
        path, _ = files
        model = random_model(averaged=False)
        halved = {name: value.half() for name, value in model.unet.state.items()}
        write_model(path / "half", "diffusers", replace(model, unet=Part(SMALL_UNET, halved)))
        unet = build_unet(SMALL_UNET)
        unet.load_state_dict(halved)  # what stage 3 trains on
        metadata = AdapterMetadata(SMALL_BASE, digest(unet))
        write_adapters(path / "three.safetensors", random_adapters(chosen=r"unet\..*to_q"), metadata)
        run("merge", path / "half", path / "first", path / "three.safetensors")
        assert "another U-Net" not in " ".join(capsys.readouterr().err.split())

    def test_what_has_no_place_in_the_merged_model_is_said(self, files, capsys, monkeypatch):
        path, _ = files
        found, kind = read_model(Source(path / "base"))
        lacking = replace(found, text_encoder=None, ignored={"conditioner": 16})
        monkeypatch.setattr(convert_model, "read_model", lambda _: (lacking, kind))
        run("merge", path / "base", path / "merged", path / "two.safetensors")
        said = " ".join(capsys.readouterr().err.split())
        assert "left out, having no place in it: conditioner (16 tensors)" in said

    @pytest.mark.parametrize("weight", ["nan", "inf", "much"])
    def test_a_weight_that_is_no_finite_number_is_refused(self, weight, files, capsys):
        path, _ = files
        with pytest.raises(SystemExit, match="2"):
            lora.main(
                ["merge", str(path / "base"), str(path / "new"), str(path / "one.safetensors"), "--weight", weight]
            )
        assert f"argument --weight: it is '{weight}'; allowed is a finite number" in capsys.readouterr().err
        assert not (path / "new").exists()

    def test_dora_is_merged_and_cannot_be_taken_out(self, files, capsys):
        path, _ = files
        adapters = random_adapters(chosen=r"unet\..*to_q", dora=True)
        write_adapters(path / "dora.safetensors", adapters, AdapterMetadata(SMALL_BASE))
        run("merge", path / "base", path / "merged", path / "dora.safetensors")
        state = read_model(Source(path / "merged"))[0].unet.state
        for key, adapter in adapters.items():
            weight = state[f"{key.removeprefix('unet.')}.weight"]
            torch.testing.assert_close(weight.norm(dim=1), adapter.magnitude)
        message = refused(capsys, "unmerge", path / "merged", path / "again", path / "dora.safetensors")
        assert "forgotten the lengths" in message
        assert not (path / "again").exists()


class TestCombining:
    def test_the_exact_sum_has_the_sum_of_ranks(self, files):
        path, sets = files
        given = [path / "one.safetensors", path / "two.safetensors", "--weight", 0.5, "--weight", 2]
        run("combine", path / "both.safetensors", *given, "--exact")
        found = read_adapters(path / "both.safetensors")
        assert found.adapters.keys() == sets["one"].keys() | sets["two"].keys()
        for key, adapter in found.adapters.items():
            pairs = [(sets[name][key], weight) for name, weight in (("one", 0.5), ("two", 2)) if key in sets[name]]
            assert adapter.rank == sum(each.rank for each, _ in pairs)
            assert relative(adapter.delta(), sum(weight * each.delta() for each, weight in pairs)) < 1e-6
        assert found.metadata.trigger_words == ("sks", "red")
        assert found.metadata.base_digest is not None

    def test_a_rank_gives_the_best_approximation(self, files):
        path, _ = files
        given = [path / "one.safetensors", path / "two.safetensors"]
        run("combine", path / "exact.safetensors", *given, "--exact")
        run("combine", path / "small.safetensors", *given, "--rank", 3, "--to", "kohya")
        exact, small = (read_adapters(path / f"{name}.safetensors").adapters for name in ("exact", "small"))
        for key, adapter in small.items():
            assert adapter.rank <= 3
            lost = float((adapter.delta() - exact[key].delta()).norm())
            assert lost == pytest.approx(float(singular_values(exact[key])[3:].norm()), abs=1e-5)


def test_extraction_finds_what_was_merged(files, capsys):
    path, sets = files
    run("merge", path / "base", path / "merged", path / "one.safetensors")
    run("extract", path / "base", path / "merged", path / "found.safetensors", "--rank", 4)
    assert "they hold 100.0% of the squared difference" in " ".join(capsys.readouterr().err.split())
    found = read_adapters(path / "found.safetensors")
    assert_same_adapters(found.adapters, sets["one"], 1e-3)
    assert found.metadata.base_digest == digest(random_unet(SMALL_UNET))
    run("extract", path / "base", path / "merged", path / "q.safetensors", "--energy", 0.9, "--layers", r"unet\..*to_q")
    assert {key.split(".")[-1] for key in read_adapters(path / "q.safetensors").adapters} == {"to_q"}


def test_extraction_tells_of_what_adapters_cannot_hold(files, capsys):
    path, _ = files
    run("merge", path / "base", path / "merged", path / "one.safetensors")
    given = ["extract", path / "base", path / "tuned", path / "found.safetensors", "--rank", 4]
    model, _ = read_model(Source(path / "merged"))
    state = model.unet.state | {"conv_in.bias": model.unet.state["conv_in.bias"] + 1}
    write_model(path / "tuned", "ldm_train", replace(model, unet=Part(SMALL_UNET, state)))
    capsys.readouterr()
    run(*given)
    assert "1 other tensors differ, such as unet.conv_in.bias;" in " ".join(capsys.readouterr().err.split())
    run("extract", path / "base", path / "merged", path / "again.safetensors", "--rank", 4)
    assert "other tensors differ" not in capsys.readouterr().err


def test_a_smaller_rank_and_its_size(files, capsys):
    path, sets = files
    run("resize", path / "one.safetensors", path / "small.safetensors", "--rank", 1, "--dtype", "float16")
    found = read_adapters(path / "small.safetensors").adapters
    assert {(adapter.rank, adapter.down.dtype) for adapter in found.values()} == {(1, torch.float16)}
    assert (path / "small.safetensors").stat().st_size < (path / "one.safetensors").stat().st_size
    assert "parameters became" in capsys.readouterr().err
    run("resize", path / "one.safetensors", path / "same.safetensors", "--energy", 1)
    assert_same_adapters(read_adapters(path / "same.safetensors").adapters, sets["one"], 1e-5)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_there_and_back_through_another_layout(layout, files, capsys):
    path, sets = files
    run("convert", path / "one.safetensors", path / "theirs.safetensors", "--to", layout)
    warned = "diffusers takes one for all attentions" in " ".join(capsys.readouterr().err.split())
    assert warned == (layout == "kohya")
    run("convert", path / "theirs.safetensors", path / "back.safetensors")
    back = read_adapters(path / "back.safetensors")
    assert_same_adapters(back.adapters, sets["one"], 1e-6)
    assert back.metadata.trigger_words == ("sks",)


def test_a_file_of_others_is_described_by_an_option(tmp_path, capsys):
    base = PUBLISHED["sd2"]
    adapters = random_adapters(base, r"unet\.middle_in\..*self_attention\.to_q", ranks=(1,))
    write_adapters(tmp_path / "a.safetensors", adapters, AdapterMetadata(base), "kohya")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
    given = ["convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert "fit sd1, sd2 and sdxl alike" in refused(capsys, *given)
    run(*given, "--unet", "sd2")
    assert read_adapters(tmp_path / "b.safetensors").metadata.base.unet["context_dim"] == 1024


class TestShowing:
    def test_everything_as_json(self, files, capsys):
        path, sets = files
        run("show", path / "one.safetensors", "--json")
        content = json.loads(capsys.readouterr().out)
        assert [layer["key"] for layer in content["layers"]] == list(sets["one"])
        for layer, adapter in zip(content["layers"], sets["one"].values(), strict=True):
            assert (layer["rank"], layer["scale"], layer["dora"]) == (4, adapter.alpha, False)
            assert layer["norm"] == pytest.approx(float(adapter.delta().norm()), rel=1e-5)
        assert content["parameters"] == sum(a.down.numel() + a.up.numel() for a in sets["one"].values())
        assert (content["layout"], content["types"], content["trigger_words"]) == ("ours", ["float32"], ["sks"])
        assert content["bytes"] == (path / "one.safetensors").stat().st_size

    def test_as_a_table(self, files, capsys):
        path, sets = files
        run("show", path / "two.safetensors")
        out = capsys.readouterr().out
        assert "trigger_words: ['red', 'sks']" in out
        assert len(re.findall(r"\n│", out)) >= len(sets["two"])

    def test_a_scale_that_nobody_said_is_told(self, files, capsys):
        path, _ = files
        write_adapters(path / "k.safetensors", random_adapters(), AdapterMetadata(SMALL_BASE), "kohya")
        run("convert", path / "one.safetensors", path / "kohya.safetensors", "--to", "kohya")
        tensors = load_file(path / "kohya.safetensors")
        tensors = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
        header = AdapterMetadata(SMALL_BASE).header()
        save_file(tensors, path / "kohya.safetensors", metadata=header)
        capsys.readouterr()
        run("show", path / "kohya.safetensors", "--json")
        assert "adapters say no alpha; it is taken for their rank" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["combine", "new.safetensors", "one.safetensors"], "--exact, the sum of ranks, or else --rank"),
        (["combine", "new.safetensors", "one.safetensors", "--exact", "--rank", 2], "choose one"),
        (["combine", "new.safetensors", "one.safetensors", "--rank", 0], "rank is 0; allowed"),
        (["combine", "new.ckpt", "one.safetensors", "--exact"], "allowed is a name in .safetensors"),
        (["combine", "one.safetensors", "two.safetensors", "--exact"], "is there already"),
        (["merge", "base", "new", "one.safetensors", "--weight", 1, "--weight", 2], "2 weights for 1 sets"),
        (["merge", "base", "new.txt", "one.safetensors"], "change TARGET or --to"),
        (["merge", "nothing", "new", "one.safetensors"], "nothing at"),
        (["merge", "base", "new", "nothing.safetensors"], "nothing at"),
        (["extract", "base", "base", "new.safetensors", "--rank", 2], "layers differs; allowed"),
        (["extract", "base", "base", "new.safetensors"], "no rank is said"),
        (["extract", "base", "base", "new.safetensors", "--rank", 2, "--layers", "("], "no regular expression"),
        (["resize", "one.safetensors", "new.safetensors"], "no rank is said"),
        (["resize", "one.safetensors", "new.safetensors", "--energy", 2], "energy is 2.0; allowed"),
        (["show", "one.safetensors", "--unet", "sd1"], "are of other shapes than the base model"),
        (["show", "one.safetensors", "--unet", "nothing"], "there is no U-Net nothing; allowed options"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, message, files, capsys, monkeypatch):
    monkeypatch.chdir(files[0])
    before = sorted(path.name for path in files[0].iterdir())
    assert message in refused(capsys, *arguments)
    assert sorted(path.name for path in files[0].iterdir()) == before


def test_every_format_of_models_can_be_the_target():
    arguments = lora.parse(["merge", "a", "b", "c", "--to", "compvis"])
    assert arguments.model_format in convert_model.SUFFIXES
