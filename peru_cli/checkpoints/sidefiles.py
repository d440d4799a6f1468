"""The small files that make weights usable: config, tokenizer, generation config, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from peru_cli.checkpoints.dtypes import BY_TORCH_NAME, Dtype
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.places import Place, children, size_of

MAX_SIDE_FILE_BYTES = 64_000_000

# Names that transformers and sentencepiece write. Python files are left out on purpose: an artifact never carries code.
_PATTERN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|merges"
    r"|preprocessor_config|processor_config|image_processor_config|video_preprocessor_config|feature_extractor_config"
    r"|chat_template|modules|config_sentence_transformers|sentence_bert_config)\.json"
    r"|(vocab|merges|bpe\.codes)\.txt|.*\.model|.*\.tiktoken|.*\.jinja|.*\.spm"
)
_SAFE = re.compile(r"[A-Za-z0-9][\w.\-]{0,127}", re.ASCII)


def is_side_file_name(name: str) -> bool:
    """Whether `name` is a plain file name that peru carries: never a path, never weights, never code."""
    return bool(_SAFE.fullmatch(name) and _PATTERN.fullmatch(name))


def find_side_files(folder: Place) -> dict[str, Place]:
    """Side files of a checkpoint folder, sorted by name."""
    found: dict[str, Place] = {}
    for path in children(folder):
        if is_side_file_name(path.name) and path.is_file() and size_of(path) <= MAX_SIDE_FILE_BYTES:
            found[path.name] = path
            inputs.note(path)
    return found


CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


def chat_template(files: Mapping[str, Place | bytes]) -> str | None:
    """The chat template in a model's side files: its own file before the one in the tokenizer's config. None without one."""

    def content(name: str) -> bytes | None:
        found = files.get(name)
        return found if found is None or isinstance(found, bytes) else found.read_bytes()

    if (own := content(CHAT_TEMPLATE)) is not None:
        return own.decode("utf-8", "replace")
    try:
        table = json.loads(content(TOKENIZER_CONFIG) or b"{}")
    except (ValueError, RecursionError):
        return None
    named = table.get("chat_template") if isinstance(table, dict) else None
    if isinstance(named, list):  # several, by name
        named = next((each.get("template") for each in named if isinstance(each, dict) and each.get("name") == "default"), None)
    return named if isinstance(named, str) else None


def config_with_dtype(content: bytes, dtype: Dtype) -> bytes:
    """A config.json in which every float type is `dtype`: transformers loads in the type that the config names."""
    try:
        config = json.loads(content)
    except ValueError:
        return content
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if _set_dtype(config, dtype) else content


def _set_dtype(config: Any, dtype: Dtype) -> bool:
    """Set the keys `dtype` and `torch_dtype` of a table and its inner tables. Returns whether anything changed."""
    changed = False
    for key, value in config.items() if isinstance(config, dict) else ():
        named = BY_TORCH_NAME.get(value) if key in ("dtype", "torch_dtype") and isinstance(value, str) else None
        if named is not None and named.compressible and named is not dtype:
            config[key] = dtype.torch_name
            changed = True
        changed |= _set_dtype(value, dtype)
    return changed
