"""`torchrun` on one host is one more way to start several processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldm_train.train import train
from tests.conftest import composed, small_demo
from tests.test_end_to_end import last, metrics

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.distributed]

ROOT = Path(__file__).parents[1]
RUN = [*small_demo(4), "callbacks.samples=null", "trainer.val_check_interval=4", "data.val_fraction=0.1"]


def test_it_has_the_losses_of_one_process_with_the_same_global_batch(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ldm_train"]
    two = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2", "run_id=two"]
    subprocess.run([*words, *RUN, *two, f"paths.root={tmp_path}"], cwd=ROOT, check=True, capture_output=True)
    train(composed(*RUN, "data.batch_size=4", "run_id=one", root=tmp_path))
    losses = [metrics(tmp_path / "demo" / run_id)["train/loss"] for run_id in ("one", "two")]
    assert last(tmp_path, run_id="two")["provenance"]["world_size"] == 2
    assert losses[0].keys() == losses[1].keys()
    assert all(losses[0][step] == pytest.approx(losses[1][step], rel=1e-4) for step in losses[0])
