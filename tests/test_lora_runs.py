"""Stage 3 as people run it: broken off and gone on with, whatever the adapters are."""

import pytest
import torch
from safetensors.torch import load_file

from ldm_train.config import load_run
from ldm_train.train import train

from .conftest import TINY_RUNS, composed

EVERYTHING = [
    "stage.targets=transformers_and_residual_blocks",
    "stage.scale_mode=rank_stabilised",
    "stage.dropout=0.3",
    "stage.dora=true",
    "stage.rank_pattern={.*to_q:2}",
]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.thorough
def test_a_run_that_was_broken_off_ends_with_the_bits_of_an_unbroken_one(precision, tiny_runs, tmp_path, capsys):
    stages = [f"{key}={tiny_runs}/{name}/default/checkpoints/last.ckpt" for key, name in (
        ("stage.base_checkpoint", "demo"), ("stage.autoencoder.checkpoint", "demo_autoencoder"))]  # fmt: skip
    common = ["experiment=demo_lora", "debug=tiny", "logger=csv", "lr_scheduler=warmup_constant", *stages]
    common += [*TINY_RUNS["demo_lora"], *EVERYTHING, f"stage.base_precision={precision}"]
    train(composed(*common, "run_id=whole", "trainer.max_steps=4", root=tmp_path))
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())  # the lines of a table
    assert "with s = 0.5, 0.7071 (rank_stabilised, alpha 1)" in printed
    for steps in (2, 4):
        train(composed(*common, "run_id=broken", f"trainer.max_steps={steps}", root=tmp_path))
    whole, broken = (tmp_path / "demo_lora" / run for run in ("whole", "broken"))
    first, second = (load_file(run / "lora/adapters.safetensors") for run in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(value.any() for name, value in first.items() if name.endswith(".up"))
    stage, _ = load_run(broken / "checkpoints/last.ckpt")
    assert all(torch.equal(change.up, second[f"{name}.up"]) for name, change in stage.adapters().items())
