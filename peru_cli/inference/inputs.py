"""Examples as a model takes them: through its own tokenizer or image processor, in batches of like length."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from peru_cli.errors import BadFile, Mismatch
from peru_cli.inference.data import Array, Examples
from peru_cli.inference.models import IMAGE, SEQ2SEQ, TEXT, Files, folder, quiet_transformers, reason

_VOCABULARY = re.compile(r"tokenizer\.json|(vocab|merges)\.(json|txt)|.*\.(model|spm|tiktoken)")
_LONGEST = 1_000_000  # tokens; tokenizers say 1e30 for "no limit"
IGNORED = -100  # a label that stands for no token

Batch = dict[str, torch.Tensor]
_TOKENIZER: list[Any] = []  # what the last one was read from, and itself: reading one takes longer than a batch


@dataclass
class Inputs:
    """Examples as a model takes them. `lengths` says how long each is (tokens), `make` gives a batch of some of them."""

    lengths: Array
    make: Callable[[Array], Batch]

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Array, Batch]]:
        """Batches of like length, the longest first: which examples (int64 numbers), and the model's arguments."""
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            yield numbers, {name: tensor.to(device) for name, tensor in self.make(numbers).items()}


def encode(examples: Examples, files: Files, config: Any, kind: str, label: str, context: int | None = None) -> Inputs:
    """Examples through a model's own tokenizer or image processor.

    Args:
        files: side files, the tokenizer's or the processor's among them.
        context: causal language models without targets: tokens of a window, into which the text is cut.

    Raises:
        BadFile: there is no tokenizer or processor, or it cannot be loaded.
        Mismatch: images of another size than the model takes, where the processor would not resize them.
    """
    if kind == IMAGE:
        return _encode_images(examples, files, config, label)
    if not any(_VOCABULARY.fullmatch(name) for name in files):  # transformers would make up an empty one
        raise BadFile(f"{label}: no tokenizer beside it or its base", "put tokenizer.json beside the model or its base")
    tokenizer = _tokenizer(files, label)
    longest = _longest(tokenizer, config)
    if kind == TEXT:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        coded = tokenizer(examples.texts, examples.pairs, truncation=longest is not None, max_length=longest)
        return Inputs(_lengths(coded["input_ids"]), lambda numbers: _padded(tokenizer, coded, numbers))
    if kind == SEQ2SEQ:
        coded = tokenizer(examples.texts, truncation=longest is not None, max_length=longest)
        targets = tokenizer(text_target=examples.targets, truncation=longest is not None, max_length=longest)["input_ids"]

        def make(numbers: Array) -> Batch:
            return _padded(tokenizer, coded, numbers) | {"labels": _rows([targets[i] for i in numbers], IGNORED)}

        return Inputs(_lengths(coded["input_ids"]), make)
    return _encode_causal(examples, tokenizer, min(context or 1024, longest or _LONGEST))


def _tokenizer(files: Files, label: str) -> Any:
    """The tokenizer among side files; the last one again if they are the same but for the names of labels, as a pack's tasks have them."""
    settings = {name: value for name, value in json.loads(files["config.json"]).items() if name not in ("id2label", "label2id")}
    key = settings, {name: content for name, content in files.items() if name != "config.json"}
    if not _TOKENIZER or _TOKENIZER[0] != key:
        with folder(files) as place:
            try:
                _TOKENIZER[:] = [key, transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)]
            except Exception as error:  # transformers raises whatever its tokenizers' own code raises
                raise BadFile(
                    f"{label}: no tokenizer that transformers loads ({reason(error)})", "put tokenizer.json beside the model or its base"
                ) from error
    return _TOKENIZER[1]


def _longest(tokenizer: Any, config: Any) -> int | None:
    """Most tokens that tokenizer and position embeddings allow; None for no limit."""
    places = getattr(config, "max_position_embeddings", None)
    if places and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer"):
        places -= (config.pad_token_id or 0) + 1  # their first positions stand for padding
    found = [n for n in (tokenizer.model_max_length, places) if n and 0 < n < _LONGEST]
    return int(min(found)) if found else None


def _lengths(rows: list[list[int]]) -> Array:
    return np.array([len(row) for row in rows], np.int64)


def _padded(tokenizer: Any, coded: Any, numbers: Array) -> Batch:
    return dict(tokenizer.pad({name: [values[i] for i in numbers] for name, values in coded.items()}, return_tensors="pt"))


def _rows(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Rows of different lengths as one tensor, filled up on the right."""
    table = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return table


def _encode_causal(examples: Examples, tokenizer: Any, context: int) -> Inputs:
    """Windows of the text; or prompts with targets, of which only the targets' tokens count."""
    assert examples.texts is not None
    rows: list[list[int]] = []
    skipped: list[int] = []  # tokens at the start of each row that are prompt
    if examples.targets is None:
        for text in examples.texts:
            ids = tokenizer(text, verbose=False)["input_ids"]
            rows += [ids[start : start + context] for start in range(0, len(ids), context)]
        rows = [row for row in rows if len(row) > 1]  # a single token predicts nothing
        skipped = [0] * len(rows)
        if not rows:
            raise BadFile(f"{examples.source}: less than two tokens of text")
    else:
        for i, (text, target) in enumerate(zip(examples.texts, examples.targets, strict=True)):
            prompt = tokenizer(text)["input_ids"]
            ids = prompt + tokenizer(target, add_special_tokens=False)["input_ids"]
            if len(prompt) >= context:
                raise BadFile(f"{examples.place(i)}: {len(prompt)} tokens of text leave no room for a target ({context} tokens in all)")
            rows.append(ids[:context])
            skipped.append(len(prompt))

    def make(numbers: Array) -> Batch:
        ids, labels = _rows([rows[i] for i in numbers], 0), _rows([rows[i] for i in numbers], IGNORED)
        mask = (labels != IGNORED).long()
        for row, i in enumerate(numbers):
            labels[row, : skipped[i]] = IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return Inputs(_lengths(rows), make)


def _encode_images(examples: Examples, files: Files, config: Any, label: str) -> Inputs:
    images = examples.images
    assert images is not None
    side = getattr(config, "image_size", None)
    size = (side, side) if isinstance(side, int) else tuple(side) if side else None
    if isinstance(images, np.ndarray) and images.dtype != np.uint8:
        if images.shape[1] != getattr(config, "num_channels", images.shape[1]) or (size and images.shape[2:] != size):
            wanted = [config.num_channels, *(size or ())]
            raise Mismatch(f"{examples.source}: images are {list(images.shape[1:])}, {label} takes {wanted}")
        return Inputs(np.zeros(len(images), np.int64), lambda numbers: {"pixel_values": torch.from_numpy(images[numbers])})
    if not any(name in files for name in ("preprocessor_config.json", "processor_config.json")):
        raise BadFile(
            f"{label}: no preprocessor_config.json, so nothing says how pixels become inputs", "put it beside the model or its base"
        )
    with folder(files) as place:
        try:
            processor: Any = transformers.AutoImageProcessor.from_pretrained(place, local_files_only=True, backend="pil")
        except (ValueError, OSError, KeyError, ImportError) as error:
            raise BadFile(f"{label}: no image processor that transformers loads ({reason(error)})") from error
    if size and not processor.do_resize and not getattr(processor, "do_center_crop", False):
        _check_sizes(examples, size, label)

    def make(numbers: Array) -> Batch:
        if isinstance(images, np.ndarray):
            chosen = [np.moveaxis(image, -1, 0) if image.ndim == 3 else image[None] for image in images[numbers]]
            with quiet_transformers():
                return dict(processor(chosen, input_data_format="channels_first", return_tensors="pt"))
        with quiet_transformers():
            return dict(processor([_open(examples, int(i), getattr(config, "num_channels", 3)) for i in numbers], return_tensors="pt"))

    return Inputs(np.zeros(len(images), np.int64), make)


def _check_sizes(examples: Examples, size: tuple[int, ...], label: str) -> None:
    """Every image has the model's size: from the files' headers, before any is decoded."""
    for i, image in enumerate(examples.images if isinstance(examples.images, list) else [examples.images]):
        found = image.shape[1:3] if isinstance(image, np.ndarray) else _header_size(examples, i, image)
        if found != size:
            place = examples.place(i) if isinstance(examples.images, list) else examples.source
            raise Mismatch(f"{place}: {found[0]}x{found[1]} pixels, {label} takes {size[0]}x{size[1]} and its processor does not resize")


def _header_size(examples: Examples, i: int, path: Any) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise BadFile(f"{examples.place(i)}: not an image that can be read") from error


def _open(examples: Examples, i: int, channels: int) -> Any:
    """One image as the processor takes it: (channels, height, width)."""
    from PIL import Image

    assert isinstance(examples.images, list)
    try:
        with Image.open(examples.images[i]) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except OSError as error:
        raise BadFile(f"{examples.place(i)}: not an image that can be read") from error
    return pixels[None] if channels == 1 else pixels


def class_logits(
    model: Any, inputs: Inputs, batch_size: int, advance: Callable[[int], None] = lambda examples: None
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of a classifier for all examples, in their order, float32 (n, labels)."""
    found = np.empty((len(inputs), model.config.num_labels), np.float32)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for numbers, batch in inputs.batches(batch_size, device):
            found[numbers] = model(**batch).logits.float().cpu().numpy()
            advance(len(numbers))
    return found
