"""The benchmark of training steps, on networks that are too small to be worth measuring."""

import json
import re
import time
from itertools import pairwise

import benchmark
import benchmark_steps
import pytest
from benchmark_unet import RESET_FILE, Inputs, Setting, counted_flops, our_network, unet_node
from torch import nn
from torch.nn import functional as F

from ldm_train.callbacks import Preemption

SMALL = ["unet", "--unet", "tiny", "--context", "7", "--context-dim", "16", "--device", "cpu", "--steps", "1"]
SMALLER = [*SMALL, "--set", "channels=16", "--latents", "8", "--batch", "2"]
NAMES = ["plain", "+ SDPA", "+ channels_last", "+ bfloat16", "+ compile", "+ checkpointing"]


def figures(tmp_path, *options):
    """What the tool writes."""
    path = tmp_path / "new" / "figures.json"
    assert benchmark.main([*options, "--output", str(path)]) == 0
    return json.loads(path.read_text())


def by_hand(arguments, monkeypatch):
    """Each weight's products at every position, those of attention, and as many again for the gradient of either."""
    total = 0
    network = our_network(unet_node(arguments), Setting("", frozenset()))
    attention = F.scaled_dot_product_attention

    def count_layer(layer, inputs, output):
        nonlocal total
        positions = output.numel() // len(layer.weight)
        total += 2 * positions * layer.weight.numel() * (2 + inputs[0].requires_grad)

    def count_attention(query, key, value, *rest, **options):
        nonlocal total
        # Scores and their use as weights: every query meets every key in all channels, twice.
        total += 2 * 3 * 2 * query.numel() * key.shape[-2]
        return attention(query, key, value, *rest, **options)

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count_layer)
    monkeypatch.setattr(F, "scaled_dot_product_attention", count_attention)
    inputs = Inputs.of(network, arguments, "cpu")
    network(inputs.x_t, inputs.t, inputs.conditioning)
    return total


@pytest.mark.parametrize("changes", [["channel_multipliers=[1]", "attention_factors=[]"], ["attention_factors=[1,2]"]])
def test_the_arithmetic_of_a_step_is_that_of_its_layers(changes, monkeypatch):
    arguments = benchmark.parse([*SMALLER, "--set", "channels=16", *changes])
    assert counted_flops(unet_node(arguments), arguments) == by_hand(arguments, monkeypatch)


def test_rows_are_switched_on_one_by_one_and_written(tmp_path, capsys):
    found = figures(tmp_path, *SMALLER, "--alone", "--without", "compile", "--peak-tflops", "0.5")
    rows, names = found["rows"], [name for name in NAMES if name != "+ compile"]
    assert [row["name"] for row in rows] == names
    shown = capsys.readouterr().out
    assert [name for name in NAMES if re.search(rf"│ {re.escape(name)} +│", shown)] == names
    assert found["diffusers_step"] is None
    for above, row in zip([None, *rows], rows, strict=False):
        assert row["step"] > 0
        assert row["images_per_second"] == pytest.approx(2 / row["step"])
        assert row["tflops"] == pytest.approx(found["tflop_a_step"] / row["step"])
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)
        assert row["of_row_above"] == (None if above is None else pytest.approx(row["step"] / above["step"]))
        assert row["of_diffusers"] is None


@pytest.mark.thorough
def test_diffusers_takes_turns(tmp_path):
    pytest.importorskip("diffusers")
    found = figures(tmp_path, *SMALLER, "--set", "channels=16", "vector_dim=null", "--without", "bfloat16", "compile")
    rows = found["rows"]
    assert [row["name"] for row in rows] == [*NAMES[:3], NAMES[5], "diffusers, as tuned"]
    assert rows[-1]["of_row_above"] is None
    assert found["diffusers_step"] > 0
    for above, row in pairwise(rows[:-1]):
        assert row["of_row_above"] == pytest.approx(row["of_diffusers"] / above["of_diffusers"])


@pytest.mark.thorough
@pytest.mark.skipif(not RESET_FILE.exists(), reason="this system does not tell the most memory that was held")
def test_memory_is_a_row_s_own(tmp_path):
    """Checkpointing shows what it saves, and a row the same after others as first of all."""
    deep = ["--set", "channels=32", "channel_multipliers=[1]", "attention_factors=[]", "num_res_blocks=6"]
    options = [*SMALL, *deep, "--latents", "16", "--batch", "16", "--alone", "--without", "bfloat16", "compile"]
    first = figures(tmp_path, *options)["rows"]
    again = figures(tmp_path, *options, "channels_last", "checkpointing")["rows"]
    plain, fused, _, checkpointed = (row["memory"] for row in first)
    assert checkpointed < 0.8 * fused < 0.8 * plain
    assert [row["memory"] for row in again] == pytest.approx([plain, fused], rel=0.15)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--unet", "giant"], r"no U-Net 'giant'; allowed are .*tiny.*; change --unet"),
        (["--set", "chanels=8"], r"`unet\.chanels` is unknown .*; allowed are .*channels.*; change --set"),
        (["--set", "channels=many"], r"`unet\.channels` is 'many', .*UNet takes int; .*; change --set"),
        (["--set", "channels=0"], r"channels is 0; allowed are numbers from 1; change `unet\.channels`"),
        (["--latents", "7"], r"latents are 7 x 7; allowed are multiples of 2.*; change `image_size`"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, parts, capsys):
    assert benchmark.main([*SMALLER, "--alone", *options]) == 2
    error = capsys.readouterr().err
    assert re.search(parts, error)


@pytest.mark.parametrize("options", [["--batch", "0"], ["--without", "haste"], ["--device", "abacus"]])
def test_options_out_of_range_are_refused_with_what_is_allowed(options, capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark.main([*SMALLER, *options])
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert re.search(rf"argument {options[0]}: .*{options[1]}.*(allowed|choose from)", error)


def test_what_callbacks_add_is_told_with_its_error(tmp_path, capsys):
    options = ["steps", "--step-ms", "0.5", "--processes", "1", "--rounds", "2"]
    rows = figures(tmp_path, *options)["rows"]
    assert [row["name"] for row in rows] == list(benchmark_steps.BASES)
    for row in rows:
        assert row["step"] > 0.0005
        assert row["share"] == pytest.approx(row["added"] / (row["step"] - row["added"]))
        assert row["error"] > 0
    assert "steps of 0.5 ms" in capsys.readouterr().out


def test_a_callback_that_takes_time_shows_it(monkeypatch, tmp_path):
    """Ten milliseconds in each step are ten milliseconds added."""

    class Slow(Preemption):
        def on_train_batch_end(self, *arguments):
            began = time.process_time()
            while time.process_time() - began < 1e-2:
                pass

    monkeypatch.setattr(benchmark_steps, "Preemption", Slow)
    rows = figures(tmp_path, "steps", "--processes", "1", "--rounds", "1")["rows"]
    assert rows[-1]["added"] == pytest.approx(1e-2, rel=0.5)
    assert all(row["added"] < 5e-3 for row in rows[:-1])


@pytest.mark.thorough
@pytest.mark.distributed
def test_two_processes_take_their_turns_together(tmp_path):
    rows = figures(tmp_path, "steps", "--step-ms", "0.1", "--rounds", "1")["rows"]
    assert [(row["processes"], row["clock"]) for row in rows[::3]] == [
        (1, "processor"), (2, "processor"), (2, "wall")
    ]  # fmt: skip
    assert all(row["step"] > 1e-4 for row in rows)
