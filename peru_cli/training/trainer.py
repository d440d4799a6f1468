"""The tau-Jp regulariser in transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peru_cli.errors import UsageError
from peru_cli.training.taujp import OtherTasks, TauJp

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # transformers takes seconds to import, and any Trainer will do


class TauJpTrainer(_Trainer):
    """A mixin that adds the regulariser to any Trainer's training loss: `class MyTrainer(TauJpTrainer, Trainer): pass`.

    A mixin, because a TrainerCallback cannot change the loss. The logged loss contains strength * penalty; `tau_jp` beside it is the mean
    penalty since the last line. Evaluation is as before."""

    def __init__(self, *args: Any, tau_jp: TauJp, others: OtherTasks, strength: float, **kwargs: Any) -> None:
        """
        Args:
            tau_jp: made from the model that is trained and its base.
            others: batches of the other tasks, about an eighth of the training batch each.
            strength: of the regulariser; the paper chose 0.001, 0.01 or 0.1.

        Raises UsageError if `tau_jp` belongs to another model."""
        super().__init__(*args, **kwargs)
        if self.accelerator.unwrap_model(self.model) is not tau_jp.model:
            raise UsageError("tau_jp was made for another model than the Trainer's", "make both from the same object")
        self._tau_jp, self._others, self._strength = tau_jp, others, strength
        self._penalties: list[torch.Tensor] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ) -> Any:
        """The Trainer's loss, plus strength * penalty while training."""
        found: Any = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return found
        loss, outputs = found if return_outputs else (found, None)
        penalty = self._tau_jp.penalty(self._others.next())
        self._penalties.append(penalty.detach())
        # Where the loss counts the items of the whole accumulated batch, the Trainer does not divide it by the number of parts.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None
        loss = loss + self._strength * penalty / (self.current_gradient_accumulation_steps if scaled else 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `tau_jp` to the lines that have a training loss."""
        if "loss" in logs and self._penalties:
            logs["tau_jp"] = float(torch.stack(self._penalties).mean())
            self._penalties.clear()
        super().log(logs, *args, **kwargs)
