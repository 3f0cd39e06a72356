"""Several processes are one run: they are compared before the first step, and watched from then on.

A rank with another config, other data or other code computes something else, and the sum of its gradients with those of
the others is nothing that anyone wanted; with another number of batches it waits for ever. So nothing starts before all
ranks have shown the same (`ldm_train.roll_call`). With one process there is nobody to watch.
"""

import hashlib
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from ldm_train.callbacks.provenance import versions
from ldm_train.callbacks.requeue import tell_of_lost
from ldm_train.distributed import patience, rank_store
from ldm_train.roll_call import Pulse, RanksDifferError, compare
from ldm_train.stacks import say_stacks

_log = logging.getLogger(__name__)

# Gloo's words; those of a store, a barrier or NCCL; and those of the comparison before the first step.
_TIME_OUT = re.compile("Timed out waiting|timeout|nothing was heard of")


class RankWatch(L.Callback):
    """Compares the ranks, and names those that are silent.

    Args:
        config: the run's, as plain dictionaries, lists and values.
        every: seconds between two signs of life.

    Raises:
        ldm_train.roll_call.RanksDifferError: before the first step, on every rank, if they differ.
    """

    def __init__(self, config: dict[str, Any], every: float = 2.0) -> None:
        self.config, self.every = config, every
        self._pulse: Pulse | None = None
        self._calls = 0
        self._work = -1, ""  # what follows the last hook, as long as no other batch was begun

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares what is known before the model is shared out; one process alone does without this callback."""
        self._calls += 1
        self._store = rank_store(f"ldm_train/{self._calls}")
        if self._store is None:
            others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            trainer.callbacks = others  # type: ignore[attr-defined]
            return
        stall = 0.8 * patience(self._store).total_seconds()
        ranks = trainer.global_rank, trainer.world_size
        own = rank_store(f"ldm_train/{self._calls}")
        assert own is not None
        stacks = partial(say_stacks, f"rank {trainer.global_rank}")
        self._pulse = Pulse(own, *ranks, lambda: self._place(trainer), self.every, stall, stacks)
        compare(self._store, "the ranks are not the same", _facts(trainer, self.config), *ranks)
        self._pulse.start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares the lengths of the loaders."""
        if self._store is not None:
            lengths = {
                "the number of training batches": trainer.num_training_batches,
                "the number of validation batches": trainer.num_val_batches,
                "the step to go on from": trainer.global_step,
            }
            compare(self._store, "the ranks would not stay together", lengths, trainer.global_rank, trainer.world_size)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What judges the model follows."""
        self._work = _batches_begun(trainer), f"after the validation at step {trainer.global_step}"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The closing work follows."""
        self._work = _batches_begun(trainer), f"the closing work after step {trainer.global_step}"

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Looks who is silent, if another rank may be the reason; then says goodbye."""
        if trainer.world_size == 1:
            return
        # Errors of communication are RuntimeErrors; so are others, after which a look does no harm.
        if isinstance(exception, RuntimeError) and self._pulse is not None and (report := self._pulse.report()):
            _log.error("%s", report)
            exception.add_note(report)  # for whoever has submitted the job
        if isinstance(exception, RuntimeError | RanksDifferError):
            silent = self._pulse.silent if self._pulse is not None else []
            tell_of_lost(silent, is_timed_out=_TIME_OUT.search(str(exception)) is not None)
        if self._pulse is None:
            return
        reason = next(iter(str(exception).splitlines()), "")
        self._pulse.stop(f"with {type(exception).__name__}: {reason}"[:300])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Says goodbye."""
        if self._pulse is not None:
            self._pulse.stop("its work")

    def _place(self, trainer: L.Trainer) -> str:
        """Where this rank is, by the counts that Lightning's loops keep anyway: no step has to say it."""
        begun, work = self._work
        if begun == _batches_begun(trainer):
            return work
        if trainer.sanity_checking or trainer.validating:
            ready = trainer._evaluation_loop.batch_progress.current.ready
            return f"validation batch {ready - 1}" if ready else "the start of a validation"
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current  # its annotation lacks two counts
        if not batches.ready:
            return f"the start of epoch {trainer.current_epoch}" if trainer.current_epoch else "the start"
        if batches.ready == batches.completed:
            part = "after "  # most of it is the wait for the next one
        elif batches.ready > batches.started:
            part = "the beginning of "
        else:
            part = "" if batches.ready > batches.processed else "the end of "
        return f"{part}batch {batches.ready - 1} of epoch {trainer.current_epoch}"


def _batches_begun(trainer: L.Trainer) -> int:
    begun: int = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    return begun


def _facts(trainer: L.Trainer, config: dict[str, Any]) -> dict[str, object]:
    """All that has to be the same, under names for people."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    indices = {"training": getattr(data, "train_index", None), "validation": getattr(data, "val_index", None)}
    facts: dict[str, object] = {f"`{key}`": value for key, value in _leaves(config).items()}
    facts |= {f"the fingerprint of the {name} data": getattr(i, "fingerprint", None) for name, i in indices.items()}
    facts |= {f"the version of {name}": version for name, version in versions().items()}
    return facts | {"the code": code_digest(Path(__file__).parents[1]), "the number of ranks": trainer.world_size}


def code_digest(package: Path) -> str:
    """The identity of a package's modules wherever they lie; asks no git, which one machine may lack."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(package).as_posix()}:{len(content)}:".encode() + content)
    return found.hexdigest()[:12]


def _leaves(node: object, path: str = "") -> dict[str, object]:
    if isinstance(node, dict) and node:
        return {
            k: v for key, value in node.items() for k, v in _leaves(value, f"{path}.{key}" if path else key).items()
        }
    return {path: node}
