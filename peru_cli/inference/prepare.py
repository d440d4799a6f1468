"""Match a model with its examples, from headers and side files, before any weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peru_cli.inference.data import Examples
from peru_cli.inference.eval_model import EvalModel
from peru_cli.inference.inputs import Inputs, encode
from peru_cli.inference.models import IMAGE, TEXT, build_model, fit_labels, kind_of, load_config, problem_of, require_shapes

_READ = ("model_type", "max_position_embeddings", "image_size", "num_channels", "pad_token_id", "vocab_size")  # keys of a config
_CONFIG = re.compile(r"(generation_)?config\.json")
_PROCESSOR = re.compile(r"(pre)?processor_config\.json")
_TOKENIZER = re.compile(r"(tokenizer|vocab|merges|special_tokens|added_tokens|bpe|chat_template).*|.*\.(model|spm|tiktoken)")


def fill_files(own: Mapping[str, bytes], others: Sequence[Mapping[str, bytes]]) -> dict[str, bytes]:
    """A model's side files, completed from the first other that has them: config, processor, and all tokenizer files together."""
    found: dict[str, bytes] = {}
    for part in (_CONFIG, _PROCESSOR, _TOKENIZER):
        for files in (own, *others):
            if chosen := {name: content for name, content in files.items() if part.fullmatch(name)}:
                found |= chosen
                break
    return found


@dataclass(frozen=True)
class Settings:
    """How models run: the dtype and device of the computation, and the window of language models (tokens)."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    context: int | None = None
    attention: str | None = None  # transformers' attn_implementation
    threads: int | None = None  # on the CPU; None chooses by the model's size


@dataclass
class Prepared:
    """A model's config and its encoded examples, matched by headers and side files; no weights yet.

    `kind` is one of those in inference/models.py."""

    subject: EvalModel
    kind: str
    config: Any
    inputs: Inputs
    reading: object  # what the inputs depend on besides the examples

    @property
    def label(self) -> str:
        """The user's name for it."""
        return self.subject.label

    def build(self, settings: Settings) -> Loaded:
        """Read the weights. Mismatch if they do not make the model."""
        model = build_model(
            self.subject.read(), self.config, self.kind, self.label,
            dtype=settings.dtype, device=settings.device, attention=settings.attention,
        )  # fmt: skip
        return Loaded(self.label, self.kind, model, self.inputs)


@dataclass
class Loaded:
    """A model that is ready to run, and its encoded examples."""

    label: str
    kind: str
    model: Any
    inputs: Inputs


def load(subject: EvalModel, examples: Examples, others: Sequence[Mapping[str, bytes]], settings: Settings) -> Loaded:
    """`prepare` and `build` in one step; see both."""
    return prepare(subject, examples, others, settings.context).build(settings)


def prepare(
    subject: EvalModel, examples: Examples, others: Sequence[Mapping[str, bytes]], context: int | None = None, like: Prepared | None = None
) -> Prepared:
    """Find out how to run a model, and encode examples for it.

    Args:
        others: side files to fall back on, of the model that it is compared with and of its base. A merge under a task's head
            takes the config of the first of them, if there is one: its own config counts the labels of no head.
        context: tokens of a window of running text.
        like: a model already prepared with the same examples. They are not encoded again if the result would be the same.

    Raises BadFile or Mismatch for every problem that shows without weights: labels outside the head, no
    tokenizer, no head, images of another size, another kind of model."""
    own = dict(subject.files)
    if not subject.own_head and any("config.json" in files for files in others):
        own.pop("config.json", None)
    files = fill_files(own, others)
    config = load_config(files, subject.label)
    kind = kind_of(examples, config, subject.label)
    fit_labels(config, kind, subject.shapes)
    require_shapes(config, kind, subject.shapes, subject.label)
    if kind in (TEXT, IMAGE):
        examples.check(config, problem_of(config))
    reading = [kind, *(getattr(config, name, None) for name in _READ)]
    reading.append({name: content for name, content in files.items() if not _CONFIG.fullmatch(name)})
    if like is not None and like.reading == reading:
        inputs = like.inputs
        if kind == TEXT and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = like.config.pad_token_id
    else:
        inputs = encode(examples, files, config, kind, subject.label, context)
    return Prepared(subject, kind, config, inputs, reading)
