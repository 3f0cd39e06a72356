"""`slurm/train.sbatch`: everything SLURM knows reaches the training, and what the training says reaches SLURM."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train.sbatch"
FAKE_SRUN = r"""#!/usr/bin/env python3
import json, os, sys
if step := os.environ.get("STEP"): open(os.environ["LDM_START_FILE"], "w").write(step)
if ended := os.environ.get("ENDED"): open(os.environ["LDM_START_FILE"] + ".ended", "w").write(ended)
if lost := os.environ.get("LOST"): open(os.environ["LDM_START_FILE"] + ".lost", "w").write(lost + "\n")
if os.environ.get("ONCE"): open(os.environ["LDM_START_FILE"] + ".once", "w")
if counted := os.environ.get("COUNTED"):
    open(os.environ["LDM_START_FILE"] + ".counted", "w")
    open(os.environ["LDM_START_FILE"] + ".deaths", "a").write(counted + "\n")
json.dump({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}, open(os.environ["RECORD"], "w"))
sys.exit(int(os.environ.get("STATUS", "0")))
"""
FAKE_SCONTROL = """#!/bin/sh
echo "$@" >> "$RECORD.scontrol"
if [ "$1" = show ]; then echo "JobId=$4 JobState=${STATE:-RUNNING} Reason=${REASON:-None} Restarts=0"; fi
"""
JOB = {"SLURM_JOB_ID": "4242", "SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.fixture
def submit(tmp_path):
    """Run a copy of the script, as SLURM does, with an `srun` that records how it was called."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "repository" / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "again.sh", tmp_path / "repository" / "slurm")

    def run(*arguments, site="", script=SCRIPT, **variables):
        spooled = tmp_path / "slurm_script"
        shutil.copy(script, spooled)
        if site:
            (tmp_path / "repository" / "slurm" / "site.sh").write_text(site)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SRUN"))}
        environment |= {
            "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}",
            "RECORD": str(tmp_path / "record.json"),
            "SLURM_SUBMIT_DIR": str(tmp_path / "repository"),
        }
        environment |= JOB | variables
        process = subprocess.run(["bash", spooled, *arguments], env=environment, capture_output=True, text=True)
        record = tmp_path / "record.json"
        return process, json.loads(record.read_text()) if record.exists() else None

    return run


def overrides(call) -> dict[str, object]:
    """What Hydra reads from the arguments after `-m ldm_train`; the last of a name wins."""
    argv = call["argv"]
    after = argv[argv.index("ldm_train") + 1 :]
    return {item.key_or_group: item.value() for item in OverridesParser.create().parse_overrides(after)}


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch", "again.sh", "site.example.sh"])
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", ROOT / "slurm" / script], check=True)


def test_directives_ask_for_requeue_and_stand_where_slurm_reads_them():
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SCRIPT.read_text(), re.MULTILINE))
    assert directives.keys() >= {"requeue", "nodes", "ntasks-per-node"}
    assert directives["open-mode"] == "append"
    assert directives["signal"] == "USR1@120"  # to the tasks: not B:, which is the script alone
    grace = OmegaConf.load(ROOT / "conf" / "callbacks" / "none.yaml").preemption.grace_seconds
    assert f"USR1@{grace}" == directives["signal"]
    lines = SCRIPT.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:])  # SLURM would ignore them


def test_every_variable_of_the_job_arrives(submit):
    process, call = submit("experiment=demo", "data.batch_size=8")
    assert process.returncode == 0, process.stderr
    assert call["argv"][call["argv"].index("python") :][:3] == ["python", "-m", "ldm_train"]
    assert overrides(call) == {
        "trainer": "slurm",
        "run_id": "4242",
        "trainer.num_nodes": 3,
        "trainer.devices": 4,
        "experiment": "demo",
        "data.batch_size": 8,
    }
    assert call["cwd"].endswith("repository")


def test_array_tasks_have_their_own_stable_run_id(submit):
    variables = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    runs = [submit(**variables, SLURM_RESTART_COUNT=str(restart))[1] for restart in (0, 1)]
    # Unquoted, Hydra would read 12_3 as the number 123, the id of another job.
    assert [overrides(call)["run_id"] for call in runs] == ["12_3", "12_3"]


def test_the_users_overrides_win_and_keep_their_spaces(submit):
    _, call = submit("run_id=again", "name='two words'", "trainer.devices=1")
    assert overrides(call) | {"run_id": "again", "name": "two words", "trainer.devices": 1} == overrides(call)


@pytest.mark.parametrize("status", [0, 1, 137])
def test_exit_status_is_that_of_srun(submit, status):
    assert submit(STATUS=str(status))[0].returncode == status


@pytest.fixture
def requeues(tmp_path):
    """How often the job was put into the queue again."""
    record = tmp_path / "record.json.scontrol"
    return lambda: record.read_text().count("requeue 4242\n") if record.exists() else 0


@pytest.mark.parametrize("status", [134, 137, 139])
def test_a_job_whose_process_was_killed_goes_into_the_queue_again(submit, requeues, status):
    said = submit(STATUS=str(status), STEP="40")[0].stderr
    assert requeues() == 1
    assert f"a process died with status {status} (a start from step 40)" in said


@pytest.mark.parametrize("status", [0, 1, 2, 128, 138, 140, 143])
def test_one_that_ended_by_itself_or_left_at_a_signal_does_not(submit, requeues, status):
    submit(STATUS=str(status))
    assert requeues() == 0


@pytest.mark.parametrize("status", [137, 138, 140, 143])
def test_one_that_was_told_to_go_and_was_not_done_at_its_time_limit_does(submit, requeues, status):
    submit(STATUS=str(status), STATE="COMPLETING", REASON="TimeLimit")
    assert requeues() == 1


def test_the_first_process_that_ended_is_the_reason(submit, requeues):
    """SLURM kills those that remain: srun's status is 137 then, as if it were the reason."""
    submit(STATUS="137", ENDED="2 1\n137 0")
    assert requeues() == 0
    submit(STATUS="137", ENDED="137 1\n1 0")
    assert requeues() == 1


@pytest.mark.parametrize("status", ["1", "137", "143"])
@pytest.mark.parametrize("lost", ["1", "2\n1", "time-out"])
def test_a_process_that_another_one_missed_is_the_reason(submit, requeues, lost, status):
    """It had no time to leave its status, or only slept, and the other one ends by an error."""
    submit(STATUS=status, ENDED="1 0\n143 2", LOST=lost)
    assert requeues() == 1


def test_a_process_that_is_missed_after_it_has_ended_by_an_error_is_not_lost(submit, requeues):
    submit(STATUS="137", ENDED="1 0\n137 1", LOST="0")
    assert requeues() == 0


@pytest.mark.parametrize("variables", [{}, {"LOST": "1"}, {"STATE": "COMPLETING", "REASON": "TimeLimit"}])
def test_one_that_wants_a_single_start_has_no_other(submit, requeues, variables):
    submit(STATUS="137", ONCE="yes", **variables)
    assert requeues() == 0
    submit(STATUS="137", **variables)
    assert requeues() == 1


def test_a_task_leaves_its_status_and_rank(submit, tmp_path):
    _, call = submit("experiment=demo")
    argv, note = call["argv"], tmp_path / "note"
    wrapper = argv[argv.index("bash") : argv.index("python")]
    for status in (0, 3):
        command = [*wrapper, "bash", "-c", f"exit {status}"]
        ended = subprocess.run(command, env=os.environ | {"LDM_START_FILE": str(note), "SLURM_PROCID": "5"})
        assert ended.returncode == status
    assert (tmp_path / "note.ended").read_text() == "3 5\n"


def test_one_that_was_cancelled_or_is_in_the_queue_does_not(submit, requeues):
    for state in ("CANCELLED", "COMPLETING", "PENDING"):
        submit(STATUS="137", STATE=state)
    assert requeues() == 0


@pytest.mark.parametrize("step", ["40", ""])
def test_one_that_dies_three_times_without_getting_further_is_left_alone(submit, requeues, step):
    """Also one that dies before it says where it begins."""
    process, _ = [submit(STATUS="137", STEP=step) for _ in range(3)][-1]
    assert requeues() == 2
    assert f"a start from step {step or 'before the first'}), as in the two starts before" in process.stderr
    assert process.returncode == 137


def test_one_that_gets_further_may_die_as_often_as_it_likes(submit, requeues):
    for step in (0, 40, 40, 80, 80, 120):
        submit(STATUS="137", STEP=str(step))
    assert requeues() == 6


ARRAY = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
ARRAY |= {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}


@pytest.mark.parametrize(("status", "state"), [("138", "RUNNING"), ("143", "PREEMPTED"), ("137", "RUNNING")])
def test_a_task_of_an_array_that_finishes_nothing_in_three_starts_is_left_alone(submit, tmp_path, status, state):
    """Told to go, or killed; one that had finished more in between has three starts again."""
    said = []
    for finished in ("", "0", "0", "3", "3", "3"):
        process, _ = submit(script=SCRIPT.with_name("array.sbatch"), STATUS=status, STATE=state, STEP=finished, **ARRAY)
        assert process.returncode == int(status)
        said.append(process.stderr)
    assert (tmp_path / "record.json.scontrol").read_text().count("requeue 42_1\n") == 5
    assert all("goes into the queue again" in each for each in said[:5])
    assert "(finished so far: 3), as in the two starts before" in said[5]


@pytest.mark.parametrize("finished", ["7", ""])
def test_a_task_that_ends_at_its_time_limit_is_counted_once(submit, tmp_path, finished):
    """SLURM still says so when the script's own end looks again."""
    limit = {"STATUS": "143", "STATE": "COMPLETING", "REASON": "TimeLimit"}
    said = [submit(script=SCRIPT.with_name("array.sbatch"), STEP=finished, **limit, **ARRAY)[0] for _ in range(3)]
    assert (tmp_path / "record.json.scontrol").read_text().count("requeue 42_1\n") == 2
    assert [process.stderr.count("goes into the queue again") for process in said] == [1, 1, 0]
    assert "as in the two starts before" in said[2].stderr


def test_a_start_that_the_training_has_counted_is_not_counted_again(submit, requeues):
    """It was told to go, saved after its time was up, and its script is asked as well."""
    limit = {"STATUS": "138", "STATE": "COMPLETING", "REASON": "TimeLimit", "STEP": "40"}
    for _ in range(2):
        submit(COUNTED="40", **limit)
    assert requeues() == 2
    process, _ = submit(COUNTED="40", **limit)
    assert requeues() == 2
    assert "as in the two starts before" in process.stderr


def test_a_task_is_deaf_to_signals_until_python_listens(submit):
    _, call = submit("experiment=demo", "name='two words'")
    argv = call["argv"]
    wrapper, arguments = argv[argv.index("bash") : argv.index("python")], argv[argv.index("python") :]
    show = "import signal, sys; print(*(signal.getsignal(n).name for n in (10, 12, 15)), *sys.argv[1:])"
    words = [sys.executable, "-c", show, *arguments[3:]]
    shown = subprocess.run([*wrapper, *words], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("SIG_IGN SIG_IGN SIG_IGN trainer=slurm ")
    assert shown.endswith("experiment=demo name='two words'\n")


def test_site_settings_reach_the_step(submit):
    _, call = submit(site="export FROM_SITE=yes\nmodule() { echo $UNSET; }\nmodule load x\n")
    assert call["env"]["FROM_SITE"] == "yes"


def test_a_failing_site_file_stops_the_job(submit):
    process, call = submit(site="return 7\n")
    assert (process.returncode, call) == (7, None)


def test_srun_is_told_the_cpus_per_task(submit):
    assert submit(SLURM_CPUS_PER_TASK="6")[1]["env"]["SRUN_CPUS_PER_TASK"] == "6"
    assert "SRUN_CPUS_PER_TASK" not in submit()[1]["env"]


def test_master_port_is_left_to_lightning(submit):
    assert "MASTER_PORT" not in submit()[1]["env"].keys() - os.environ.keys()


def test_outside_slurm_it_says_so(tmp_path):
    process = subprocess.run(["bash", SCRIPT], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert process.returncode != 0
    assert "submit this script with sbatch" in process.stderr
