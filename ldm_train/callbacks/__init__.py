"""What happens around training steps: averaging, judging, drawing, saving, measuring, guarding, tracking.

The order in a config is the order of the calls, and it matters: `ThroughputMonitor` comes first (what follows a step is
a pause), then `NonFiniteGuard`, `RunSummary` and `EMACallback`, then whatever samples, draws or saves. Lightning calls
`Preemption` and `CheckpointWriter` after all others.
"""

from ldm_train.callbacks.calibration import LatentCalibration
from ldm_train.callbacks.checkpoints import AdapterExport, CheckpointError, CheckpointWriter
from ldm_train.callbacks.ema import EMACallback, evaluation_weights
from ldm_train.callbacks.generation import SampleEvaluation
from ldm_train.callbacks.guards import NonFiniteGuard, NonFiniteLossError
from ldm_train.callbacks.health import AutoencoderHealth
from ldm_train.callbacks.idle_hooks import hide_idle_hooks
from ldm_train.callbacks.image_grid import AdapterGrid, ReconstructionGrid
from ldm_train.callbacks.likelihood import LikelihoodEvaluation
from ldm_train.callbacks.loss_by_time import LossByTime
from ldm_train.callbacks.preemption import Preempted, Preemption, interruptible, listening
from ldm_train.callbacks.progress import progress_bar
from ldm_train.callbacks.provenance import RunRecord
from ldm_train.callbacks.ranks import RankWatch
from ldm_train.callbacks.reconstruction import ReconstructionFrechet
from ldm_train.callbacks.requeue import refuse_another_start
from ldm_train.callbacks.summary import RunSummary
from ldm_train.callbacks.throughput import ThroughputMonitor
from ldm_train.callbacks.tracking import MetricsCSV, finish_wandb, leave_wandb, wandb_logger

__all__ = [
    "AdapterExport",
    "AdapterGrid",
    "AutoencoderHealth",
    "CheckpointError",
    "CheckpointWriter",
    "EMACallback",
    "LatentCalibration",
    "LikelihoodEvaluation",
    "LossByTime",
    "MetricsCSV",
    "NonFiniteGuard",
    "NonFiniteLossError",
    "Preempted",
    "Preemption",
    "RankWatch",
    "ReconstructionFrechet",
    "ReconstructionGrid",
    "RunRecord",
    "RunSummary",
    "SampleEvaluation",
    "ThroughputMonitor",
    "evaluation_weights",
    "finish_wandb",
    "hide_idle_hooks",
    "interruptible",
    "leave_wandb",
    "listening",
    "progress_bar",
    "refuse_another_start",
    "wandb_logger",
]
