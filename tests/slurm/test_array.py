"""`slurm/array.sbatch`: some tasks make what one makes, also if one of them loses its place."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.data.conftest import sample, write_tar
from tests.interchange.networks import SMALL, random_autoencoder

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def submit(cluster, folder, array, *words, **variables):
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "LDM_RUNS": str(folder), "OMP_NUM_THREADS": "1"} | variables
    options = [f"--array={array}", f"--chdir={ROOT}", f"--output={folder}/%a.txt"]
    return cluster.submit(*options, ROOT / "slurm" / "array.sbatch", *words, **variables)


def finish(cluster, job, task):
    """The facts of a task that has ended for good; an array shows its tasks one by one once they run."""
    return cluster.wait(f"{job}_{task}", 120)


def tool(folder, output):
    """The words that cache the latents of the folder's shards."""
    model = random_autoencoder(SMALL)
    model.calibrate(torch.zeros(4), torch.ones(4))
    state = {f"autoencoder.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "config": {"autoencoder": SMALL}}, folder / "autoencoder.ckpt")
    words = [
        "--checkpoint",
        folder / "autoencoder.ckpt",
        "--data",
        folder / "shards/*.tar",
        "--output",
        folder / output,
    ]
    return ["tools/cache_latents.py", *map(str, words), "--image-size", "16", "--device", "cpu", "--workers", "0"]


@pytest.mark.thorough
def test_tasks_of_which_one_loses_its_place_make_the_cache_that_one_process_makes(cluster, tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"shards/{number}.tar", [m for i in range(3) for m in sample(3 * number + i)])
    torch.manual_seed(0)
    words = tool(tmp_path, "one")
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    words[words.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    job = submit(cluster, tmp_path, "0-1", *words)
    while f"{job}_0.0 " not in cluster.run("squeue", "--noheader", "--steps", "--format=%i "):
        time.sleep(0.2)
    time.sleep(0.5)  # the tool is loading
    cluster.run("scancel", "--signal=USR1", f"{job}_0")
    facts = [finish(cluster, job, task) for task in (0, 1)]
    assert [(each["JobState"], each["Restarts"]) for each in facts] == [("COMPLETED", "1"), ("COMPLETED", "0")]
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() == {f"{number}_latents.json" for number in range(4)} | {"manifest.json"}
    for name in one.keys() - {"manifest.json"}:
        images, moments = ([of[name][part] for of in (one, two)] for part in ("images", "moments"))
        assert images[0] == images[1]
        # Of the same encoder in another process: not the last bit of a convolution.
        assert moments[0]["squares"] == pytest.approx(moments[1]["squares"], rel=1e-4)


def records(folder):
    """What the cache says of its shards."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.thorough
def test_a_task_that_has_to_go_three_times_before_it_has_finished_anything_is_left_alone(cluster, tmp_path):
    goes = tmp_path / "goes.py"
    goes.write_text("import os, signal; os.kill(os.getpid(), signal.SIGUSR1)")
    facts = finish(cluster, submit(cluster, tmp_path, "0", goes), 0)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "2")
    said = (tmp_path / "0.txt").read_text()
    assert said.count("the tool was told to go") == 3
    assert said.count("as in the two starts before") == 1


def test_a_part_of_an_array_has_to_say_of_how_many(cluster, tmp_path):
    show = tmp_path / "show.py"
    show.write_text("import sys; print(sys.argv[1:])")
    refused = submit(cluster, tmp_path, "3", show)
    assert finish(cluster, refused, 3)["ExitCode"] == "2:0"
    assert "allowed are all from 0 on, or some of N tasks" in (tmp_path / "3.txt").read_text()
    again = submit(cluster, tmp_path, "5", show, "--fast", NUM_TASKS="16")
    assert finish(cluster, again, 5)["JobState"] == "COMPLETED"
    assert "['--fast', '--task-index', '5', '--num-tasks', '16']" in (tmp_path / "5.txt").read_text()
