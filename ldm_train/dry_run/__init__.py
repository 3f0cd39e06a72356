"""What a run would fail of, found before a queue is joined: on a login node, without a GPU and without a step.

Each check is a line: what was looked at, how it is, the figure, and what to do. A check that fails does not keep the
next ones from being made, so that all problems are seen at once. The run's own code does the checking wherever it can:
the config is refused by what would refuse it, the networks are built as the run builds them but without values (on
torch's `meta` device), data come from the run's own loader, and one step of training, one of validation and a save are
made by `ldm_train.train.train` itself, with small networks of the same kinds.

Nothing is left in the run's directory, and its lock is not taken. Two things are kept elsewhere, for the run needs them
as well: the index of the shards in `data.index_dir`, and one shard of remote data in `data.cache_dir`.
"""

from ldm_train.dry_run.checks import dry_run
from ldm_train.dry_run.weights import NeededWeights, needed_weights

__all__ = ["NeededWeights", "dry_run", "needed_weights"]
