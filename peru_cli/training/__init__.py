"""Fine-tunes that merge well: the tau-Jp regulariser and linearised fine-tuning, in your own training."""

from peru_cli.training.linear import linearize
from peru_cli.training.taujp import OtherTasks, TauJp
from peru_cli.training.trainer import TauJpTrainer

__all__ = ["OtherTasks", "TauJp", "TauJpTrainer", "linearize"]
