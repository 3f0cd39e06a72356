"""The cluster of the tests is one: jobs on two nodes, signals, cancelling, requeue, preemption."""

import pytest

pytestmark = [pytest.mark.slurm]

TRAP = """#!/bin/bash
#SBATCH --requeue --open-mode=append
trap 'echo told; scontrol requeue $SLURM_JOB_ID; sleep 30' USR1
echo "start ${SLURM_RESTART_COUNT:-0}"
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then for i in $(seq 300); do sleep 0.1; done; fi
echo end
"""


def test_both_nodes_answer(cluster):
    output = cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME")
    assert sorted(output.split()) == ["node1", "node2"]


def test_a_job_that_asks_for_it_starts_again(cluster, tmp_path):
    script, output = tmp_path / "job.sh", tmp_path / "output"
    script.write_text(TRAP)
    job = cluster.submit(f"--output={output}", script)
    cluster.wait_for_text(job, output, "start 0")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    facts = cluster.wait(job, 60)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert output.read_text().split("\n")[-3:-1] == ["start 1", "end"]


def test_an_urgent_job_takes_the_place_of_another_which_comes_back(cluster, tmp_path):
    script, output = tmp_path / "job.sh", tmp_path / "output"
    script.write_text(TRAP)
    job = cluster.submit(f"--output={output}", "--nodes=2", "--exclusive", "--signal=B:USR1@60", script)
    cluster.wait_for_text(job, output, "start 0")
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert cluster.wait(urgent, 60)["JobState"] == "COMPLETED"
    assert cluster.wait(job, 60)["Restarts"] == "1"
    assert "told" in output.read_text()
