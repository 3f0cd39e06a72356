"""What belongs to other settings stays apart from a sweep: figures, trials of a study, plans."""

import pytest

from ldm_train.config import ConfigError, plain
from ldm_train.submission import job_name, study_of
from ldm_train.sweeps import save_plan, table_of_sweep, unfinished
from ldm_train.train import refuse_figures_of_other_settings

from .conftest import composed


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.batch_size=4", "data.batch_size"),
        ("data.flip=true", "data.flip"),
        ("trainer.gradient_clip_val=0.01", "trainer.gradient_clip_val"),
        ("trainer.max_steps=2", "trainer.max_steps"),
        ("seed=3", "seed"),
        ("logger=none", None),
        ("metric=val/loss", None),
        ("callbacks.health=null", None),
        ("run_id=moved", None),
    ],
)
def test_figures_that_belong_to_other_settings_are_no_figures_of_a_sweep(tmp_path, override, key):
    words = ["experiment=demo_autoencoder", "trainer.max_steps=4"]
    before, now = (plain(composed(*words, *more, root=tmp_path)) for more in ([], [override]))
    content = {"global_step": 4, "config": before}
    refuse_figures_of_other_settings({**content, "global_step": 1}, now, tmp_path)  # it goes on
    if key is None:
        refuse_figures_of_other_settings(content, now, tmp_path)
        return
    with pytest.raises(ConfigError, match=rf"`{key}`: .*change `run_id`") as refused:
        refuse_figures_of_other_settings(content, now, tmp_path)
    assert "resume=never" in str(refused.value)


def test_trials_of_another_budget_or_metric_are_of_another_study():
    words = ["experiment=demo", "trainer.max_steps=300"]
    study = study_of("demo", "val/loss", words)
    assert study == study_of("demo", "val/loss", [*reversed(words), "logger=csv", "paths.root=/elsewhere"])
    others = {
        study_of("demo", "val/loss", [words[0], "trainer.max_steps=30"]),
        study_of("demo", "val/fid", words),
        study_of("other", "val/loss", words),
    }
    assert len(others | {study}) == 4
    cfg = composed("experiment=demo", "sweep=optuna", return_hydra_config=True)
    assert cfg.hydra.sweeper.study_name.startswith(f"demo {cfg.metric} ")


def test_a_second_sweep_of_the_same_keys_keeps_the_plan_of_the_first(tmp_path):
    save_plan(tmp_path, [["seed=0"], ["seed=1"]], "2026-01-01T00:00:00+00:00")
    save_plan(tmp_path, [["seed=1"], ["seed=2"]], "2026-01-02T00:00:00+00:00")
    table = table_of_sweep(tmp_path)
    assert {row.overrides["seed"] for row in table.rows} == {"0", "1", "2"}
    assert {row.overrides["seed"] for row in unfinished(table, "2026-01-02T00:00:00+00:00")} == {"1", "2"}


def test_jobs_are_named_by_what_a_sweep_varies_and_told_apart_by_all_settings():
    fixed = ["experiment=demo", "trainer.max_steps=9", "data.shards='/data/{00..01}.tar'", "trainer.max_steps=5"]

    def name(*words, swept=("optimizer.lr",)):
        return job_name(words, swept, ["experiment", "trainer"])

    first = name(*fixed, "optimizer.lr=1e-4")
    assert first.rpartition("-")[0] == "optimizer.lr=1e-4"
    assert first == name("optimizer.lr=1e-4", *fixed[1:], "experiment=other", "trainer=ddp")
    others = {
        name(*fixed, "optimizer.lr=1e-5"),
        name(*fixed, "trainer.max_steps=9", "optimizer.lr=1e-4"),
        name(*fixed[:2], "optimizer.lr=1e-4"),
        name(*fixed, "optimizer.lr=1e-4", swept=["trainer.max_steps"]),
    }
    assert len(others | {first}) == 5
    assert name("experiment=demo", "optimizer.lr=1e-4") == "optimizer.lr=1e-4"
    assert name("data.shards=a/b", "+seed=1", swept=[""]) == "data.shards=a_b,+seed=1"  # of nobody's sweep
    assert name("+seed=1", "optimizer.lr=1e-4", swept=["seed"]).rpartition("-")[0] == "+seed=1"
    assert name("experiment=demo") == ""
    long = {name(f"optimizer.lr={'1' * 300}{end}", "seed=1") for end in "12"}
    assert len(long) == 2
    assert max(map(len, long)) < 255
