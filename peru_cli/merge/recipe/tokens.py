"""Tokenizer and chat template of a recipe's output."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.sidefiles import CHAT_TEMPLATE, TOKENIZER_CONFIG, chat_template
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.finetunes.revocabulary import common_vocabulary
from peru_cli.merge.recipe.document import Complaints
from peru_cli.merge.recipe.parts import ModelName, Recipe
from peru_cli.shown import listed

_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|merges|chat_template)\.json"
    r"|(vocab|merges|bpe\.codes)\.txt|.*\.model|.*\.tiktoken|.*\.jinja|.*\.spm"
)
_VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}


def check_template(recipe: Recipe, line: int, complaints: Complaints) -> None:
    """Report a chat template that is neither known nor Jinja."""
    text = recipe.chat_template
    if text is not None and text != "auto" and text not in CHAT_TEMPLATES and "{" not in text:
        known = ", ".join(("auto", *CHAT_TEMPLATES))
        complaints.error(line, f"chat_template {text!r} is unknown: write {known}, or a Jinja template")


def align_tokens(
    recipe: Recipe, opened: Mapping[ModelName, Checkpoint], complaints: Complaints
) -> tuple[dict[ModelName, Checkpoint], list[str]]:
    """The models under the recipe's tokenizer, their rows matched by token, and messages about it.

    Models that already agree on token ids stay unchanged. The output gets the chosen one's tokenizer files (`settle_tokens`)."""
    wanted = recipe.tokenizer
    if wanted is None:
        return dict(opened), []
    if wanted.tokens:
        complaints.error(wanted.line, "tokenizer.tokens chooses the rows of single tokens, which peru cannot do yet")
    if wanted.source == "base" and recipe.base is None:
        complaints.error(wanted.line, "the tokenizer should be the base's, but there is no base_model: add one, or write union")
        return dict(opened), []
    source = str(recipe.base) if wanted.source == "base" else wanted.source
    named = {str(name): model for name, model in opened.items()}
    if source != "union" and source not in named:
        base = ", base" if recipe.base is not None else ""
        text = f"the tokenizer source {source!r} is not a model of this recipe: write union{base} or one of {listed(named)}"
        complaints.error(wanted.line, text)
        return dict(opened), []
    known = [found for model in opened.values() if (found := vocabulary(model)) is not None]
    sizes = [rows for model in opened.values() if isinstance(rows := model.config().get("vocab_size"), int)]
    multiple = wanted.pad_to_multiple_of or 1
    if all(found == known[0] for found in known) and len(set(sizes)) < 2 and all(rows % multiple == 0 for rows in sizes):
        return dict(opened), []
    try:
        aligned, said = common_vocabulary(list(named.items()), recipe.base is not None, source, multiple)
    except UsageError as error:
        complaints.error(wanted.line, str(error))
        return dict(opened), []
    return dict(zip(opened, aligned, strict=True)), said


def settle_tokens(recipe: Recipe, opened: Mapping[ModelName, Checkpoint], donor: Checkpoint) -> dict[str, bytes]:
    """Side files that differ from the donor's: the chosen tokenizer's, and the chat template."""
    changed: dict[str, bytes] = {}
    if recipe.tokenizer is not None:
        chosen = next((model for name, model in opened.items() if str(name) == recipe.tokenizer.source), donor)
        if chosen is not donor:
            changed |= {name: place.read_bytes() for name, place in chosen.side_files.items() if _FILES.fullmatch(name)}
    if recipe.chat_template is not None:
        text = CHAT_TEMPLATES.get(recipe.chat_template, recipe.chat_template)
        if recipe.chat_template == "auto":
            text = _most_frequent([template for model in opened.values() if (template := chat_template(model.side_files))])
        if text:
            changed[CHAT_TEMPLATE] = text.encode()
            config = changed.get(TOKENIZER_CONFIG) or _bytes(donor, TOKENIZER_CONFIG)
            if config is not None and "chat_template" in (table := _table(config)):
                del table["chat_template"]
                changed[TOKENIZER_CONFIG] = (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def _most_frequent(templates: Sequence[str]) -> str:
    counted = Counter(templates)  # in order of first appearance
    return max(counted, key=lambda template: counted[template], default="")


def _bytes(model: Checkpoint, name: str) -> bytes | None:
    place: Place | None = model.side_files.get(name)
    return place.read_bytes() if place is not None else None


def _table(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def vocabulary(model: Checkpoint) -> object:
    """A key that tells vocabularies apart: token by id, with added tokens. None for a model without a tokenizer."""
    content = _bytes(model, "tokenizer.json")
    if content is None:
        return next((found for name in _VOCABULARIES if (found := _bytes(model, name)) is not None), None)
    table = _table(content)
    inner = table.get("model")
    tokens = inner.get("vocab") if isinstance(inner, dict) else None
    added = table.get("added_tokens")
    listed = [(token.get("id"), token.get("content")) for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return tokens, listed
