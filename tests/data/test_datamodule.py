import os
import signal

import lightning as L
import numpy as np
import pytest
import torch

from ldm_train.data import FieldIn, ImageTextDataModule, ShuffledOrder, TrainingSampler
from tests.data.conftest import sample, write_tar

EPOCHS, BATCH = 2.5, 2


class Recorder(L.LightningModule):
    """Trains nothing worth knowing and remembers which samples it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["epoch"], *batch["sample_id"].tolist()))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["sample_id"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    """Saves a checkpoint at every call of one hook, named after the batches trained."""

    def __init__(self, folder, hook):
        self.folder = folder
        setattr(self, hook, self._save)

    def _save(self, trainer, module, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(datamodule, steps, resume=None, callbacks=(), module=None, **options):
    module = module or Recorder()
    options = {"devices": 1, "limit_val_batches": 0, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.fixture
def make(write_shards):
    shards = write_shards(4, 5, 2)

    def build(**options):
        return ImageTextDataModule(shards, **{"image_size": 8, "batch_size": BATCH, "seed": 3, **options})

    return build


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_validation_end"])
def test_resumed_anywhere_equals_uninterrupted(make, tmp_path, hook, workers):
    per_epoch = 11 // BATCH
    total = int(EPOCHS * per_epoch)
    options = {"limit_val_batches": 1, "val_check_interval": 2} if hook == "on_validation_end" else {}
    options["num_sanity_val_steps"] = 0
    make_it = lambda: make(num_workers=workers, val_shards=make().corpus.options.shards)  # noqa: E731
    straight = fit(make_it(), total, callbacks=[SaveAt(tmp_path, hook)], **options)
    saved = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    assert len(straight) == total
    assert [seen[0] for seen in straight] == [step // per_epoch for step in range(total)]
    expected = {"on_train_batch_end": [*range(1, total + 1)], "on_train_epoch_end": [5, 10, 12], "on_train_end": [12]}
    assert saved == expected.get(hook, saved)
    assert len(saved) >= 1
    extra = fit(make_it(), total + 4, **options)
    for step in saved:
        assert fit(make_it(), total + 4, resume=tmp_path / f"{step}.ckpt", **options) == extra[step:], step


def test_interrupted_at_every_step_in_a_row(make, tmp_path):
    total = 17
    straight = fit(make(), total)
    chained, last = [], None
    for step in range(1, total + 1):
        chained += fit(make(), step, resume=last, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
        last = tmp_path / f"{step}.ckpt"
    assert chained == straight


def test_failure_inside_a_step_leaves_that_batch_to_be_trained(make, tmp_path):
    class Failing(Recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 7:
                self.trainer.save_checkpoint(tmp_path / "failed.ckpt")
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    straight = fit(make(), 12)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(make(), 12, module=Failing())
    assert fit(make(), 12, resume=tmp_path / "failed.ckpt") == straight[7:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1)])
def test_another_batch_size_continues_the_same_sequence(make, tmp_path, before, after, workers):
    datamodule = make()
    order = ShuffledOrder(datamodule.train_index.starts, seed=3)
    ids = [order.rows(epoch, np.arange(11)).tolist() for epoch in range(12)]
    steps = 2 * (11 // before)
    fit(make(batch_size=before), steps, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
    for step in range(1, steps + 1):
        epoch, behind = divmod(step, 11 // before)
        seen = fit(make(batch_size=after, num_workers=workers), step + 14, resume=tmp_path / f"{step}.ckpt")
        rest = [(epoch, sample) for sample in ids[epoch][behind * before :]]
        rest = rest[: len(rest) // after * after]
        later = [(e, sample) for e in range(epoch + 1, epoch + 8) for sample in ids[e][: 11 // after * after]]
        flat = [(row[0], sample) for row in seen for sample in row[1:]]
        assert flat == (rest + later)[: len(flat)], step
        assert len(seen) == 14


def test_limited_epochs_resume_too(make, tmp_path):
    options = {"limit_train_batches": 3}
    straight = fit(make(), 10, callbacks=[SaveAt(tmp_path, "on_train_batch_end")], **options)
    assert [seen[0] for seen in straight] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    for step in range(1, 10):
        assert fit(make(), 10, resume=tmp_path / f"{step}.ckpt", **options) == straight[step:]


def test_a_second_fit_begins_again(make):
    datamodule = make()
    assert fit(datamodule, 7) == fit(datamodule, 7)


def test_run_takes_nothing_from_the_global_generator(make):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make(num_workers=2).train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_workers_do_not_change_a_batch(make):
    options = {"flip": True, "crop": "random"}
    here, there = make(**options).train_dataloader(), make(num_workers=2, **options).train_dataloader()
    pairs = list(zip(here, there, strict=True))
    assert len(pairs) == len(here) == 5
    for a, b in pairs:
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["sample_id"], b["sample_id"])
        assert (a["key"], a["caption"], a["epoch"]) == (b["key"], b["caption"], b["epoch"])


def test_cache_gives_identical_batches(make):
    cached, plain = make(cache_decoded=True, flip=True), make(flip=True)
    for _ in range(2):
        for a, b in zip(cached.train_dataloader(), plain.train_dataloader(), strict=True):
            assert torch.equal(a["image"], b["image"])
            assert a["caption"] == b["caption"]


class Ranges(Recorder):
    """Remembers the values of the images that it trains and validates on."""

    def _look(self, batch):
        assert batch["image"].dtype == torch.float32
        bytes_of = ((batch["image"][:, :, 0, 0] + 1) * 127.5).round().int().tolist()
        assert bytes_of == [[number, 0, 7] for number in batch["sample_id"].tolist()]

    def training_step(self, batch, batch_idx):
        self._look(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._look(batch)
        super().validation_step(batch, batch_idx)


def test_a_stage_sees_values_from_minus_one_to_one_where_workers_send_bytes(make):
    datamodule, stage = make(val_fraction=0.3), Ranges()
    fit(datamodule, 4, module=stage, limit_val_batches=1.0)
    assert len(stage.seen) == 4
    assert stage.validated
    for batch in datamodule.reference_batches(4, 2):
        stage._look(batch)


def test_samples_carry_their_own_picture_and_caption(make):
    for batch in make().train_dataloader():
        colour = batch["image"][:, :, 0, 0].tolist()
        numbers = batch["sample_id"].tolist()
        assert colour == [[number, 0, 7] for number in numbers]
        assert batch["caption"] == [f"caption {number}" for number in numbers]
        assert [key.rpartition("/")[2] for key in batch["key"]] == [f"{number:06d}" for number in numbers]


def test_positions_are_places_in_the_order_of_each_loader(make):
    datamodule = make(val_fraction=0.4)
    order = ShuffledOrder(datamodule.train_index.starts, seed=3)
    batches = list(datamodule.train_dataloader())
    for batch in batches:
        rows = order.rows(0, batch["position"].numpy())
        assert datamodule.train_index.sample_id[rows].tolist() == batch["sample_id"].tolist()
    held_out, references = list(datamodule.val_dataloader()), list(datamodule.reference_batches(5, 2))
    for part in (batches, held_out, references):
        positions = torch.cat([batch["position"] for batch in part])
        assert positions.dtype == torch.int64
        assert positions.tolist() == list(range(len(positions)))


def test_validation_sees_each_held_out_sample_once(make):
    datamodule = make(val_fraction=0.4)
    module = Recorder()
    fit(datamodule, 3, module=module, limit_val_batches=None, num_sanity_val_steps=0)
    everything = {*datamodule.train_index.sample_id.tolist(), *datamodule.val_index.sample_id.tolist()}
    assert sorted(module.validated) == datamodule.val_index.sample_id.tolist()
    assert everything == set(range(11))
    assert not set(module.validated) & {sample for row in module.seen for sample in row[1:]}


def test_without_validation_fit_runs(make):
    module = Recorder()
    fit(make(), 2, module=module, limit_val_batches=None)
    assert module.validated == []


def test_split_does_not_depend_on_the_shards(tmp_path):
    def held_out(folder, *counts):
        numbers = iter(range(60))
        for shard, count in enumerate(counts):
            members = [member for _ in range(count) for member in sample(next(numbers))]
            write_tar(tmp_path / folder / f"{shard}.tar", members)
        index = ImageTextDataModule(str(tmp_path / folder / "*.tar"), 8, 1, 0, val_fraction=0.3).val_index
        return {index.key(row) for row in range(len(index))}

    assert held_out("one", 60) == held_out("many", 7, 30, 23)
    assert 6 <= len(held_out("one", 60)) <= 30


def test_reference_batches_are_fixed_and_plain(make):
    plain = list(make().reference_batches(None, 4))
    other = list(make(seed=9, flip=True, crop="random", num_workers=2).reference_batches(None, 4))
    assert [batch["key"] for batch in plain] == [batch["key"] for batch in other]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(plain, other, strict=True))
    assert sorted(torch.cat([batch["sample_id"] for batch in plain]).tolist()) == list(range(11))
    first = [batch["key"] for batch in make().reference_batches(5, 5)]
    assert first == [[*plain[0]["key"], plain[1]["key"][0]]]
    assert {batch["epoch"] for batch in plain} == {0}


def test_limit_and_filters_come_before_the_split(make):
    datamodule = make(filters=[FieldIn("parity", [0])], limit=4, batch_size=1)
    assert datamodule.train_index.sample_id.tolist() == [0, 2, 4, 6]
    assert datamodule.summary()["training images"] == 4
    assert datamodule.summary()["refused by filters"] == 5


def test_state_is_plain_and_refuses_other_data(make, tmp_path):
    fit(make(), 3, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
    state = torch.load(tmp_path / "3.ckpt", weights_only=True)["ImageTextDataModule"]
    assert {type(value) for value in state.values()} <= {int, str}
    assert (state["epoch"], state["samples"]) == (0, 6)
    with pytest.raises(ValueError, match=r"fingerprint .* `data.limit`.*`resume=never`"):
        fit(make(limit=9), 5, resume=tmp_path / "3.ckpt")
    with pytest.raises(ValueError, match="seed 3 -> 4"):
        fit(make(seed=4), 5, resume=tmp_path / "3.ckpt")


def test_damage_is_said_and_listed(write_shards, tmp_path):
    shards = write_shards(3)
    write_tar(tmp_path / "shards" / "00001.tar", [*sample(7)[:2], *sample(8)])
    datamodule = ImageTextDataModule(shards, 8, 2, 0, quarantine_dir=str(tmp_path / "quarantine"))
    with pytest.warns(UserWarning, match="000007: no caption"):
        datamodule.setup("fit")
    assert "000007: no caption" in (tmp_path / "quarantine" / "damage.jsonl").read_text()
    assert len(datamodule.train_index) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"`data.image_size` is 0; it must be positive"),
        ({"batch_size": -1}, r"`data.batch_size` is -1"),
        ({"val_batch_size": 0}, r"`data.val_batch_size` is 0"),
        ({"num_workers": -1}, r"`data.num_workers` is -1; it must be 0"),
        ({"seed": -1}, "`seed`"),
        ({"val_fraction": 1.0}, r"`data.val_fraction` is 1.0; it must be at least 0 and below 1"),
        ({"val_fraction": 0.1, "val_shards": "x.tar"}, "0 beside `val_shards`"),
        ({"crop": "left"}, "one of"),
        ({"interpolation": "nearest"}, "one of"),
        ({"crop": "random", "cache_decoded": True}, "center beside `cache_decoded`"),
    ],
)
def test_wrong_options_are_refused_with_their_key(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 12}, "11 training images are fewer than one global batch of 12.*`data.batch_size`"),
        ({"filters": [FieldIn("parity", [7])]}, "no training image is left.*fails: parity in.*11.*`data.filters`"),
        ({"filters": [FieldIn("partiy", [0])]}, "no metadata field 'partiy'"),
        ({"val_fraction": 0.0001}, "raise `data.val_fraction`"),
        ({"val_shards": "nowhere/*.tar"}, "`data.val_shards`"),
    ],
)
def test_data_that_cannot_train_are_refused(make, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(**options).train_dataloader()


def test_overfit_batches_is_refused(make):
    with pytest.raises(ValueError, match=r"`trainer.overfit_batches` is 2.*`data.limit`"):
        fit(make(), 2, overfit_batches=2)


def test_signals_do_not_reach_workers(make):
    loader = make(num_workers=1, batch_size=1).train_dataloader()
    batches = iter(loader)
    next(batches)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(batches._workers[0].pid, number)
    assert len(list(batches)) == 10


def test_lightning_keeps_the_sampler_with_several_ranks(make):
    loader = make().train_dataloader()
    assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)
    assert isinstance(loader.sampler, TrainingSampler)


class RankRecorder(Recorder):
    """Writes what its rank was given to a file, for it runs in another process."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        torch.save((self.seen, sorted(self.validated)), self.folder / f"rank{self.global_rank}.pt")


@pytest.mark.distributed
def test_two_ranks_share_epochs_and_resume_as_one(make, tmp_path):
    def run(folder, steps, resume=None, devices=2):
        (tmp_path / folder).mkdir()
        datamodule = make(val_shards=make().corpus.options.shards, batch_size=2 // devices)
        options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
        saver = SaveAt(tmp_path / folder, "on_train_batch_end")
        module = RankRecorder(tmp_path / folder)
        fit(datamodule, steps, resume, [saver], module, limit_val_batches=None, num_sanity_val_steps=0, **options)
        ranks = [torch.load(tmp_path / folder / f"rank{rank}.pt") for rank in range(devices)]
        steps = zip(*(seen for seen, _ in ranks), strict=True)
        together = [(parts[0][0], *(sample for _, *samples in parts for sample in samples)) for parts in steps]
        return together, [sample for _, validated in ranks for sample in validated]

    alone, _ = run("alone", 12, devices=1)
    together, validated = run("together", 12)
    assert together == alone
    assert sorted(validated) == sorted([*range(11)] * 2)
    for step in (3, 5, 8):
        assert run(f"resumed{step}", 12, tmp_path / "alone" / f"{step}.ckpt")[0] == alone[step:]
        assert run(f"back{step}", 12, tmp_path / "together" / f"{step}.ckpt", devices=1)[0] == alone[step:]
