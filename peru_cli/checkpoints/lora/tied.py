"""Config changes for adapters that untie head and embedding or resize the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from peru_cli.checkpoints.architectures import is_embedding, is_output, is_tied, tied_embedding
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import pieces

Read = Callable[[str, int, memoryview], None]


def is_untied(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> bool:
    """Whether a model with a tying config has an output matrix that differs from its embedding.

    `read` fills a buffer with a tensor's bytes from an offset on. Both are read up to the first difference."""
    head = next((name for name in tensors if is_output(name)), None) if is_tied(config) else None
    embedding = tied_embedding(config, tensors)
    if head is None or embedding is None:
        return False
    one, other = tensors[head], tensors[embedding]
    if one.shape != other.shape or one.dtype is not other.dtype:
        return True
    both = zip(*(pieces(info, partial(read, info.name)) for info in (one, other)), strict=True)
    return any(ours != theirs for (_, ours), (_, theirs) in both)


def vocabulary(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], before: Mapping[str, TensorInfo]) -> int | None:
    """The new number of embedding rows, if it has changed and the config counts the old one. None otherwise."""
    text = config.get("text_config")
    counted = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    for name, info in tensors.items():
        old = before.get(name)
        if old is None or not info.shape or old.shape == info.shape or not name.endswith(".weight"):
            continue
        if old.shape[1:] == info.shape[1:] and (is_embedding(name.removesuffix(".weight")) or is_output(name)) and counted != info.shape[0]:
            return info.shape[0]
    return None


def with_settings(config: bytes, **settings: Any) -> bytes:
    """config.json with some settings changed, each in the place where the config has it: in `text_config` if it is only there."""
    table = json.loads(config)
    text = table.get("text_config")
    for name, value in settings.items():
        if isinstance(text, dict) and name in text:
            text[name] = value
        if name in table or not (isinstance(text, dict) and name in text):
            table[name] = value
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
