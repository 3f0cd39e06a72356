"""What a run is, before it starts, and where to look when it is over. Rank 0 prints both."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.table import Table
from torch import nn

from ldm_train.callbacks.progress import total_steps
from ldm_train.callbacks.provenance import RunRecord

_PLACES = {
    "reconstructions": "reconstructions/*.png",
    "samples": "samples/*.png",
    "before and after": "lora/*.png",
    "adapters": "**/*.safetensors",
    "checkpoint": "checkpoints/last.ckpt",
    "figures": "metrics.csv",
}
_BAD, _CACHE = "data/bad/", "data/cache/"


class RunSummary(L.Callback):
    """Prints a table of the run at its start, and at its end the last figures and the files to look at.

    List it before callbacks that work at the start of training, so that the table comes first.

    Args:
        run_dir: the run's directory.
        metrics: keys whose last values are shown at the end; those that were never logged are left out.
    """

    def __init__(self, run_dir: str, metrics: Iterable[str] = ()) -> None:
        self.run_dir = Path(run_dir)
        self.metrics = list(metrics)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is about to be trained."""
        if trainer.is_global_zero:
            console = Console()
            console.print(_parts_table(pl_module.parts()))  # type: ignore[operator]
            console.print(_facts_table("run", self._facts(trainer, pl_module)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """What came out, when all callbacks have written their last; not called after an error."""
        if not trainer.is_global_zero:
            return
        console = Console(soft_wrap=True)  # paths stay in one piece, to be clicked or copied
        values = {key: trainer.callback_metrics[key] for key in self.metrics if key in trainer.callback_metrics}
        if values:
            console.print(_facts_table("figures", {key: f"{float(value):.4g}" for key, value in values.items()}))
        if loading := loading_figures({key: float(value) for key, value in trainer.callback_metrics.items()}):
            console.print(_facts_table("loading, at the last logged step", loading))
        console.print("\n[bold]Look at[/bold]")
        for what, where in files_to_look_at(self.run_dir).items():
            console.print(f"  {what}: {where}", highlight=False, markup=False)

    def _facts(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, object]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        steps = total_steps(trainer)
        batch = data.global_batch_size * trainer.accumulate_grad_batches
        records = [c.facts() for c in trainer.callbacks if isinstance(c, RunRecord)]  # type: ignore[attr-defined]
        processes = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
        return {
            "optimizer steps": f"{steps - trainer.global_step} of {steps}" if trainer.global_step else steps,
            "effective batch": f"{batch} images a step",
            "images to see": f"{steps * batch:,}",
            **data.summary(),
            **(pl_module.facts() if hasattr(pl_module, "facts") else {}),  # type: ignore[operator]
            "device": f"{processes}{pl_module.device.type}",
            "precision": trainer.precision,
            "run directory": self.run_dir,
            **(records[0] if records else {}),
        }


def files_to_look_at(run_dir: Path) -> dict[str, str]:
    """Description -> path of the newest file of each kind that exists, or the command that shows it."""
    found = {}
    for what, pattern in _PLACES.items():
        paths = sorted(run_dir.glob(pattern))
        if paths:
            earlier = f" (and {len(paths) - 1} earlier)" if len(paths) > 1 else ""
            found[what] = f"{paths[-1]}{earlier}"
    if any(run_dir.glob("wandb/offline-run-*")):
        found["charts"] = f"wandb leet {run_dir / 'wandb'}"
    return found


def loading_figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """What loading came to, in words, of the figures that `ThroughputMonitor` logs; what never happened is left out."""
    figures: dict[str, str] = {}
    if (share := metrics.get("train/data_wait_share")) is not None:
        figures["waiting for data"] = f"{share:.1%} of the time"
    if (rate := metrics.get("data/images_per_second_per_worker")) is not None:
        figures["a worker makes"] = f"{rate:,.1f} images/s"
    bad = {key.removeprefix(_BAD): int(value) for key, value in metrics.items() if key.startswith(_BAD)}
    if bad:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad.items() if count)
        figures["bad samples"] = kinds or "none"
    figures |= {
        f"cache {key.removeprefix(_CACHE)}": f"{int(value):,}"
        for key, value in metrics.items()
        if key.startswith(_CACHE)
    }
    return figures


def _parts_table(parts: Mapping[str, nn.Module]) -> Table:
    table = Table("part", title="parameters", title_justify="left")
    for column in ("all", "trainable", "share"):
        table.add_column(column, justify="right")
    counts = {name: _count(part) for name, part in parts.items()}
    total = tuple(map(sum, zip(*counts.values(), strict=True))) or (0, 0)
    for name, (everything, trainable) in [*counts.items(), ("total", total)]:
        share = f"{100 * trainable / everything:.3g} %" if everything else "-"
        table.add_row(name, f"{everything:,}", f"{trainable:,}", share, end_section=name == list(counts)[-1])
    return table


def _count(part: nn.Module) -> tuple[int, int]:
    parameters = list(part.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _facts_table(title: str, facts: Mapping[str, object]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
