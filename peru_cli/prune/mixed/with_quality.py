"""`--min-quality` with `--data`: the fewest bytes with which a model gives the fine-tune's answers on so many of the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peru_cli.artifacts.mixed.writer import Represented
from peru_cli.errors import Mismatch, UsageError
from peru_cli.inference.inputs import BATCH_SIZES, counted_logits
from peru_cli.inference.metrics import Estimate, wilson
from peru_cli.inference.models import IMAGE, LABELS, TEXT, VALUE, problem_of
from peru_cli.inference.task_models import digest_inputs, load_fine_tune
from peru_cli.prune.artifact import PruneTask
from peru_cli.prune.mixed.decompose import Item
from peru_cli.prune.mixed.family import Family
from peru_cli.prune.mixed.price import supply
from peru_cli.prune.mixed.represent import Price, choose, size_of
from peru_cli.prune.mixed.with_data import one_thread
from peru_cli.prune.mixed.write import result_of

_STRIDE = math.log(4)  # of the multiplier, until the wanted share is between two prices: about twice the bytes
_FURTHEST = 24.0  # from the start
_CLOSE = 0.03  # bytes between the last two prices, as a share
_BISECTIONS = 7


@dataclass(frozen=True)
class Agreement:
    """On how many examples (of a language model: tokens) the artifact's model gives the fine-tune's answer."""

    task: str
    digest: str  # of the examples
    examples: int
    counted: int
    agreed: int
    unit: str  # "examples", "labels", or "tokens"

    @property
    def share(self) -> Estimate:
        """The share of all answers, with Wilson's interval."""
        return wilson(self.agreed, self.counted)

    def encode(self) -> str:
        """As the artifact records it: digest, examples, answers, answers that are the fine-tune's."""
        return f"{self.digest} {self.examples} {self.counted} {self.agreed}"

    def figures(self) -> dict[str, object]:
        """For --json."""
        share = self.share
        return {"examples": self.examples, "digest": self.digest, "unit": self.unit, "metric": "agreement", "counted": self.counted} | {
            "agreed": self.agreed, "value": share.value, "low": share.low, "high": share.high
        }  # fmt: skip

    def __str__(self) -> str:
        share = self.share
        return (
            f"{self.task}: the fine-tune's answer on {self.agreed:,} of {self.counted:,} {self.unit}, {100 * share.value:.2f}% "
            f"({100 * share.low:.2f} to {100 * share.high:.2f}); the same examples chose the bytes"
        )


class _Answers:
    """A fine-tune's model, whose answers are compared with those under other weights."""

    def __init__(self, family: Family, task: PruneTask, items: Sequence[Item]) -> None:
        assert family.running is not None
        self._family, self._fine, self._items = family, task.vector.fine, {item.name: item for item in items}
        self.examples = family.running.examples[task.vector.name]
        self._loaded, self._own = load_fine_tune(task.vector.fine, family.base, self.examples, family.running.device)
        model = self._loaded.model
        self._is_classifier = self._loaded.kind in (TEXT, IMAGE)
        self._has_labels = self._is_classifier and problem_of(model.config) == LABELS
        if self._is_classifier and problem_of(model.config) == VALUE:
            raise UsageError(
                f"{task.vector.name} predicts numbers, which agree more or less: --min-quality with --data counts equal answers",
                "give --max-bytes or --bits with --data, or --min-quality without it",
            )
        self.unit = "labels" if self._has_labels else "examples" if self._is_classifier else "tokens"
        self._places = dict(model.named_parameters()) | dict(model.named_buffers())
        self._size = family.running.batch_size or BATCH_SIZES[self._loaded.kind]
        self._order = np.argsort(self._loaded.inputs.lengths, kind="stable")
        self.wanted = self._all()

    def _all(self) -> torch.Tensor:
        """Class numbers, or for several labels whether each holds; (answers,)."""
        found, model = [], self._loaded.model
        device = next(model.parameters()).device
        with torch.no_grad(), one_thread():
            for start in range(0, len(self._order), self._size):
                batch = {n: t.to(device) for n, t in self._loaded.inputs.make(self._order[start : start + self._size]).items()}
                logits, _ = counted_logits(model, batch, self._loaded.kind)
                if not bool(torch.isfinite(logits).all()):
                    raise Mismatch(f"{self._loaded.label}: some outputs are NaN or infinite on these examples", "leave --data out")
                found.append((logits > 0).flatten() if self._has_labels else logits.argmax(-1))
        return torch.cat(found)

    def agreed(self, parts: Mapping[str, Represented]) -> int:
        """How many answers are the fine-tune's under the weights that unpacking these parts gives."""
        for name, place in self._places.items():
            item = self._items.get(self._own.get(name, ""))
            if item is not None:
                weight = result_of(self._family.base, self._fine, item, parts[item.name])
                place.data = weight.to(place.device, place.dtype).view(place.shape)
        return int((self._all() == self.wanted).sum())


def keep_answers(family: Family, number: int, wanted: float, start: float, note: Callable[[str], None]) -> Agreement:
    """Fix a task's items at the fewest bytes with which at least the share `wanted` of the answers stays.

    `start` is the logarithm of the first multiplier to try. UsageError if no price keeps so many.
    """
    task, frame = family.tasks[number], family.frames[number]
    items = [item for item in family.items if item.task == number]
    answers = _Answers(family, task, items)
    best: tuple[float, int, int, dict[str, Represented]] | None = None
    failed: tuple[float, int] | None = None

    def measure(at: float) -> bool:
        nonlocal best, failed
        price = Price(math.exp(at), True)
        supply(family, items, price)
        parts = choose(items, family.spill, price, family.how)
        nbytes, agreed = size_of(frame, items, parts), answers.agreed(parts)
        note(f"{task.vector.name}: {100 * agreed / len(answers.wanted):.2f}% of the answers at {nbytes:,} bytes")
        if agreed >= wanted * len(answers.wanted):
            if best is None or nbytes < best[1]:
                best = at, nbytes, agreed, parts
            return True
        failed = at, nbytes
        return False

    at, step = start, _STRIDE if measure(start) else -_STRIDE
    while (best is None or failed is None) and abs(at - start) < _FURTHEST and not (best and _is_empty(best[3])):
        at += step
        measure(at)
    if best is None:
        raise UsageError(f"{task.vector.name}: no artifact of kind mixed keeps {100 * wanted:g}% of the answers", "use --lossless")
    for _ in range(_BISECTIONS):
        if failed is None or best[1] - failed[1] <= _CLOSE * best[1]:
            break
        measure((best[0] + failed[0]) / 2)
    for item in items:
        item.fixed = best[3][item.name]
    return Agreement(task.vector.name, digest_inputs(answers.examples), len(answers.examples), len(answers.wanted), best[2], answers.unit)


def _is_empty(parts: Mapping[str, Represented]) -> bool:
    """Whether nothing is left that a higher price could drop."""
    return all(part.left is None and part.dense is None for part in parts.values())
