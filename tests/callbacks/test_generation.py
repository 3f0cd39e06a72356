import csv
import multiprocessing as mp

import pytest
import torch
from PIL import Image

from ldm_train.callbacks import AdapterGrid, EMACallback, MetricsCSV, ReconstructionGrid, SampleEvaluation
from ldm_train.callbacks.generation import _select
from ldm_train.metrics import FrechetDistance, RandomConvFeatures, retrieval_at_1, to_uint8
from tests.callbacks.toy import NUM_IMAGES, ToyData, ToyStage, batch_of, trainer_of
from tests.ranks import run_ranks

KEYS = ("val/fid_randomconv", "val/retrieval_at_1", "val/retrieval_times_chance")


def _evaluation(tmp_path, **options):
    defaults = {"num_images": NUM_IMAGES, "num_pairs": 16, "batch_size": 10, "every_n_steps": 4}
    return SampleEvaluation(str(tmp_path), RandomConvFeatures(), **{**defaults, **options})


def _rows(tmp_path):
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row[KEYS[0]]]
    return [{"step": int(row["step"])} | {key: float(row[key]) for key in KEYS} for row in rows]


def _expected(colours):
    """Both figures from one batch, without the callback."""
    batch, extractor = batch_of(range(NUM_IMAGES)), RandomConvFeatures()
    images = to_uint8(colours[:, :, None, None].expand_as(batch["image"]).clamp(-1, 1))
    distance = FrechetDistance(extractor)
    distance.update(batch["image"], real=True)
    distance.update(images, real=False)
    share = retrieval_at_1(extractor(images[:16]), extractor(batch["image"][:16]))
    return {KEYS[0]: distance.compute().item(), KEYS[1]: share.item(), KEYS[2]: 16 * share.item()}


def test_untrained_interval_and_end_are_judged_with_the_averaged_weights(tmp_path):
    stage, ema, evaluation = ToyStage(), EMACallback(decay=0.5), _evaluation(tmp_path)
    trainer = trainer_of(tmp_path, [ema, evaluation], logger=MetricsCSV(tmp_path), limit_val_batches=0)
    trainer.fit(stage, ToyData())

    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 4, 6]
    assert rows[0][KEYS[1]] == pytest.approx(1 / 16)  # one grey for all captions: chance
    expected = _expected(ema.average.average["colours.weight"])
    assert {key: rows[-1][key] for key in KEYS} == pytest.approx(expected, rel=1e-5)
    assert {key: trainer.callback_metrics[key].item() for key in KEYS} == pytest.approx(expected, rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step_{step:07d}.png" for step in (0, 4, 6)
    ]


def test_a_model_that_has_learnt_its_captions_finds_all_references(tmp_path):
    stage = ToyStage()
    with torch.no_grad():
        stage.colours.weight.copy_(batch_of(range(NUM_IMAGES))["image"].mean(dim=(2, 3)))
    trainer_of(tmp_path, [_evaluation(tmp_path)], logger=MetricsCSV(tmp_path)).validate(stage, ToyData())
    row = _rows(tmp_path)[0]
    assert row[KEYS[0]] == pytest.approx(0.0, abs=1e-6)
    assert row[KEYS[1]] == 1.0
    assert row[KEYS[2]] == 16.0


def test_the_last_step_is_judged_once_and_a_resumed_run_does_not_judge_its_start(tmp_path):
    evaluation = _evaluation(tmp_path, every_n_steps=3)
    trainer = trainer_of(tmp_path, [evaluation], logger=MetricsCSV(tmp_path), limit_val_batches=0)
    trainer.fit(ToyStage(), ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = _evaluation(tmp_path, every_n_steps=None)
    resumed = trainer_of(tmp_path, [again], logger=MetricsCSV(tmp_path), max_steps=12, limit_val_batches=0)
    resumed.fit(ToyStage(), ToyData(), ckpt_path=tmp_path / "last.ckpt")
    assert [row["step"] for row in _rows(tmp_path)] == [0, 3, 6, 12]


def test_validate_uses_the_step_of_the_checkpoint(tmp_path):
    trainer = trainer_of(tmp_path, [], limit_val_batches=0)
    trainer.fit(ToyStage(), ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    judge = trainer_of(tmp_path, [_evaluation(tmp_path)], logger=MetricsCSV(tmp_path))
    judge.validate(ToyStage(), ToyData(), ckpt_path=tmp_path / "last.ckpt")
    assert [row["step"] for row in _rows(tmp_path)] == [6]


def test_training_is_untouched_by_the_evaluations(tmp_path):
    judged, plain = ToyStage(), ToyStage()
    trainer_of(tmp_path, [EMACallback(), _evaluation(tmp_path)], limit_val_batches=0).fit(judged, ToyData())
    trainer_of(tmp_path, [], limit_val_batches=0).fit(plain, ToyData())
    assert torch.equal(judged.colours.weight, plain.colours.weight)


def test_reference_statistics_are_read_back_and_checked(tmp_path):
    path = tmp_path / "cache" / "real.safetensors"
    figures = []
    for _ in range(2):
        evaluation = _evaluation(tmp_path, reference_statistics=str(path))
        trainer = trainer_of(tmp_path, [evaluation])
        trainer.validate(ToyStage(), ToyData())
        figures.append(trainer.callback_metrics[KEYS[0]].item())
    assert figures[0] == figures[1]
    assert evaluation.distance.real_count == 0  # the second run measured no real image
    other = _evaluation(tmp_path, reference_statistics=str(path), num_real=12)
    with pytest.raises(ValueError, match=r"12 of 8 x 8(.|\n)*callbacks\.samples\.reference_statistics"):
        trainer_of(tmp_path, [other]).validate(ToyStage(), ToyData())


def test_numbers_that_contradict_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_images=8, num_pairs=16(.|\n)*callbacks\.samples\.num_images"):
        _evaluation(tmp_path, num_images=8)


def _one_rank(rank, directory, world, shared):
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    stage = ToyStage()
    with torch.no_grad():
        stage.colours.weight.copy_(torch.randn(NUM_IMAGES, 3, generator=torch.Generator().manual_seed(1)))
    evaluation = _evaluation(directory, batch_size=5)
    trainer = trainer_of(directory, [evaluation])
    trainer.datamodule = ToyData()
    trainer.strategy.connect(stage)
    evaluation._prepare_reference(trainer, stage)
    sheet = evaluation._generate(trainer, stage)
    shared[rank] = (
        evaluation.distance.compute().item(),
        evaluation.retrieval.compute()["retrieval_at_1"].item(),
        torch.stack(sheet.images["generated"]).long().sum().item(),
    )
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_give_the_figures_and_the_sheet_of_one(tmp_path):
    results = []
    for world in (1, 2):
        directory = tmp_path / str(world)
        directory.mkdir()
        with mp.Manager() as manager:
            shared = manager.dict()
            run_ranks(_one_rank, directory, world, shared, world=world)
            results += [shared[rank] for rank in range(world)]
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[2] == pytest.approx(results[0], rel=1e-6)


def test_reconstructions_stand_below_their_images(tmp_path):
    trainer = trainer_of(tmp_path, [ReconstructionGrid(str(tmp_path), num_images=6)], val_check_interval=3)
    trainer.fit(ToyStage(), ToyData())
    assert sorted(path.name for path in (tmp_path / "reconstructions").iterdir()) == [
        "step_0000003.png",
        "step_0000006.png",
    ]
    sheet = Image.open(tmp_path / "reconstructions" / "step_0000006.png").convert("RGB")
    colours = {colour for count, colour in sheet.getcolors(1 << 20) if count >= 96 * 96}
    images = to_uint8(batch_of(range(6))["image"])[:, :, 0, 0]
    halves = to_uint8(batch_of(range(6))["image"] * 0.5)[:, :, 0, 0]
    assert colours >= {tuple(c) for c in images.tolist()} | {tuple(c) for c in halves.tolist()}


def test_the_adapter_sheet_shows_reference_before_and_after(tmp_path):
    stage = ToyStage()
    trainer_of(tmp_path, [EMACallback(decay=0.0), AdapterGrid(str(tmp_path), num_images=3)]).fit(stage, ToyData())
    sheet = Image.open(tmp_path / "lora" / "before_after.png").convert("RGB")
    colours = {colour for count, colour in sheet.getcolors(1 << 20) if count >= 96 * 96}
    after = to_uint8(stage.colours.weight.detach()[:3].clamp(-1, 1))
    reference = to_uint8(batch_of(range(3))["image"])[:, :, 0, 0]
    grey = tuple(to_uint8(torch.zeros(3)).tolist())
    assert colours >= {tuple(c) for c in after.tolist()} | {tuple(c) for c in reference.tolist()} | {grey}


def test_some_rows_of_a_batch_keep_all_that_belongs_to_them():
    batch = batch_of(range(6)) | {"label": torch.arange(6) * 10, "segmentation": torch.arange(6).view(6, 1, 1)}
    some = _select(batch, [4, 1])
    assert some.keys() == batch.keys()
    assert some["epoch"] == 0
    assert some["caption"] == ["colour 4", "colour 1"]
    assert some["label"].tolist() == [40, 10]
    for name in ("image", "sample_id", "position", "segmentation"):
        assert torch.equal(some[name], batch[name][[4, 1]])
