"""Turn examples into a model's inputs with its own tokenizer or image processor, in batches of similar length."""

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
from peru_cli.inference.models import CAUSAL, IMAGE, SEQ2SEQ, TEXT, Files, folder, quiet_transformers, reason, takes_attention_mask
from peru_cli.inference.remote_code import code_for

_VOCABULARY = re.compile(r"tokenizer\.json|(vocab|merges)\.(json|txt)|.*\.(model|spm|tiktoken)")
_LONGEST = 1_000_000  # tokens; tokenizers use 1e30 for "no limit"
IGNORED = -100  # a label for positions without a token
BATCH_SIZES = {TEXT: 64, IMAGE: 64, CAUSAL: 4, SEQ2SEQ: 16}  # unless the user says

Batch = dict[str, torch.Tensor]
_TOKENIZER: list[Any] = []  # the source of the last tokenizer, and the tokenizer: reading one takes longer than a batch


@dataclass
class Inputs:
    """Examples as a model takes them. `lengths` are their lengths in tokens, `make` builds a batch of some of them."""

    lengths: Array
    make: Callable[[Array], Batch]
    padded: bool = True  # False if padding would change the outputs: then all examples of a batch have the same length

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Array, Batch]]:
        """Batches of similar length, the longest first: indices of the examples (int64), and the model's arguments."""
        order = np.argsort(-self.lengths, kind="stable")
        start = 0
        while start < len(order):
            numbers = order[start : start + size]
            if not self.padded:
                numbers = numbers[self.lengths[numbers] == self.lengths[numbers[0]]]
            start += len(numbers)
            yield numbers, {name: tensor.to(device) for name, tensor in self.make(numbers).items()}


def encode(examples: Examples, files: Files, config: Any, kind: str, label: str, context: int | None = None) -> Inputs:
    """Encode examples with a model's own tokenizer or image processor.

    Args:
        files: side files, including the tokenizer's or the processor's.
        context: causal language models without targets: tokens of the windows into which the text is cut.

    Raises:
        BadFile: there is no tokenizer or processor, or it cannot be loaded.
        Mismatch: images have another size than the model takes, and the processor would not resize them."""
    if kind == IMAGE:
        return _encode_images(examples, files, config, label)
    tokenizer, longest = _tokenizer_of(files, config, label)
    if kind == TEXT:
        coded = tokenizer(examples.texts, examples.pairs, truncation=longest is not None, max_length=longest)
        return _encode_classified(examples, coded, tokenizer, config, label)
    if kind == SEQ2SEQ:
        coded = tokenizer(examples.texts, truncation=longest is not None, max_length=longest)
        targets = tokenizer(text_target=examples.targets, truncation=longest is not None, max_length=longest)["input_ids"]

        def make(numbers: Array) -> Batch:
            batch = _padded(coded, numbers, _pad_id(tokenizer, config) or 0, tokenizer)
            return batch | {"labels": _rows([targets[i] for i in numbers], IGNORED)}

        return Inputs(_lengths(coded["input_ids"]), make)
    return _encode_causal(examples, tokenizer, min(context or 1024, longest or _LONGEST))


def encode_each(examples: Examples, files: Files, config: Any, label: str) -> Inputs:
    """Texts or images as inputs of a model without its head, each text on its own, whatever the model is made for.

    Raises BadFile and Mismatch as `encode` does."""
    if examples.images is not None:
        return encode(examples, files, config, IMAGE, label)
    tokenizer, longest = _tokenizer_of(files, config, label)
    coded = tokenizer(examples.texts, examples.pairs, truncation=longest is not None, max_length=longest)
    pad = _pad_id(tokenizer, config) or 0
    return Inputs(_lengths(coded["input_ids"]), lambda numbers: _padded(coded, numbers, pad, tokenizer))


def _tokenizer_of(files: Files, config: Any, label: str) -> tuple[Any, int | None]:
    """A model's tokenizer, and its longest input in tokens. BadFile if there is none, Mismatch if it is another model's."""
    if not any(_VOCABULARY.fullmatch(name) for name in files):  # transformers would make up an empty one
        raise BadFile(f"{label}: no tokenizer beside the model or its base", "put tokenizer.json beside the model or its base")
    tokenizer = _tokenizer(files, label)
    _check_vocabulary(tokenizer, config, label)
    return tokenizer, _longest(tokenizer, config)


def _tokenizer(files: Files, label: str) -> Any:
    """The tokenizer in the side files. Reuses the last one if the files differ only in label names, as those of a pack's tasks do."""
    settings = {name: value for name, value in json.loads(files["config.json"]).items() if name not in ("id2label", "label2id")}
    code = code_for(files)
    key = settings, {name: content for name, content in files.items() if name != "config.json"}, code
    if not _TOKENIZER or _TOKENIZER[0] != key:
        with folder({**files, **code}) as place:
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=bool(code))
                _TOKENIZER[:] = [key, tokenizer]
            except Exception as error:  # transformers passes on whatever its tokenizers' code raises
                raise BadFile(
                    f"{label}: transformers cannot load its tokenizer ({reason(error)})", "put tokenizer.json beside the model or its base"
                ) from error
    return _TOKENIZER[1]


def _longest(tokenizer: Any, config: Any) -> int | None:
    """The longest input that tokenizer and position embeddings allow, in tokens. None for no limit."""
    places = getattr(config, "max_position_embeddings", None)
    if places and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer"):
        places -= (config.pad_token_id or 0) + 1  # their first positions are for padding
    found = [n for n in (tokenizer.model_max_length, places) if n and 0 < n < _LONGEST]
    return int(min(found)) if found else None


def _lengths(rows: list[list[int]]) -> Array:
    return np.array([len(row) for row in rows], np.int64)


def _check_vocabulary(tokenizer: Any, config: Any, label: str) -> None:
    """Mismatch if the tokenizer has tokens without an embedding row: it is another model's, or tokens were added."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    ids = tokenizer.get_vocab().values()
    if isinstance(rows, int) and ids and max(ids) >= rows:
        more = sum(number >= rows for number in ids)
        raise Mismatch(
            f"{label}: its tokenizer has {len(ids)} tokens, the embedding {rows} rows: {more} tokens have no row",
            "the tokenizer belongs to another model, or tokens were added after the embedding was saved",
        )


def _pad_id(tokenizer: Any, config: Any) -> int | None:
    """The padding id: the config's, by which models recognise padding, or the tokenizer's. None if neither has one."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    for number in (getattr(config, "pad_token_id", None), tokenizer.pad_token_id):
        if isinstance(number, int) and number >= 0 and (rows is None or number < rows):
            return number
    return None


def _encode_classified(examples: Examples, coded: Any, tokenizer: Any, config: Any, label: str) -> Inputs:
    """Batches whose outputs equal those of each example alone.

    Decoders find an example's end by the config's padding id. If it has none (or none with an embedding row), they read the
    last position; then an id that no example contains serves as padding, so that an end-of-text token inside a text is not taken
    for it. Rows are padded on the right, because positions are counted from the left, except for XLNet, which itself reads
    the last position. If a model takes no attention mask, all examples of a batch have the same length."""
    rows = coded["input_ids"]
    if (empty := next((i for i, row in enumerate(rows) if not row), None)) is not None:
        raise BadFile(f"{examples.place(empty)}: the tokenizer of {label} gives no token for it")
    size, given = getattr(config.get_text_config(), "vocab_size", None), getattr(config, "pad_token_id", None)
    pad, padded = _pad_id(tokenizer, config), takes_attention_mask(config, TEXT, label)
    if not (isinstance(given, int) and given >= 0 and (size is None or given < size)):
        used = {token for row in rows for token in row}
        unused = next((i for i in (pad, *range(size or 0)) if i is not None and i not in used), None)
        pad, padded = unused, padded and unused is not None
        config.pad_token_id = unused
    left = config.model_type == "xlnet"
    return Inputs(_lengths(rows), lambda numbers: _padded(coded, numbers, pad or 0, tokenizer, left), padded)


def _padded(coded: Any, numbers: Array, pad: int, tokenizer: Any, left: bool = False) -> Batch:
    """Some rows of each field, padded with that field's neutral value."""
    fill = {"input_ids": pad, "token_type_ids": tokenizer.pad_token_type_id}
    batch = {name: _rows([values[i] for i in numbers], fill.get(name, 0), left) for name, values in coded.items()}
    if "attention_mask" not in batch and any(len(coded["input_ids"][i]) < batch["input_ids"].shape[1] for i in numbers):
        batch["attention_mask"] = _rows([[1] * len(coded["input_ids"][i]) for i in numbers], 0, left)
    return batch


def _rows(rows: list[list[int]], fill: int, left: bool = False) -> torch.Tensor:
    """Rows of different lengths as one tensor, padded on the right, or the left."""
    table = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(table.shape[1] - len(row), None) if left else slice(len(row))
        table[i, place] = torch.tensor(row, dtype=torch.int64)
    return table


def _encode_causal(examples: Examples, tokenizer: Any, context: int) -> Inputs:
    """Windows of the text, or prompts with targets, of which only the targets' tokens count."""
    assert examples.texts is not None
    rows: list[list[int]] = []
    skipped: list[int] = []  # prompt tokens at the start of each row
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
        raise BadFile(f"{label}: no preprocessor_config.json, which says how pixels become inputs", "put it beside the model or its base")
    code = code_for(files)
    with folder({**files, **code}) as place:
        try:
            processor: Any = transformers.AutoImageProcessor.from_pretrained(
                place, local_files_only=True, trust_remote_code=bool(code), backend="pil"
            )
        except Exception as error:
            if not code and not isinstance(error, (ValueError, OSError, KeyError, ImportError)):
                raise
            raise BadFile(f"{label}: transformers cannot load its image processor ({reason(error)})") from error
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
    """Check that every image has the model's size, from the files' headers, before any is decoded."""
    for i, image in enumerate(examples.images if isinstance(examples.images, list) else [examples.images]):
        found = image.shape[1:3] if isinstance(image, np.ndarray) else _header_size(examples, i, image)
        if found != size:
            place = examples.place(i) if isinstance(examples.images, list) else examples.source
            raise Mismatch(f"{place}: {found[0]}x{found[1]} pixels, {label} takes {size[0]}x{size[1]}, and its processor does not resize")


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
    """Logits of a classifier for all examples, in order, float32 (n, labels)."""
    found = np.empty((len(inputs), model.config.num_labels), np.float32)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for numbers, batch in inputs.batches(batch_size, device):
            found[numbers] = model(**batch).logits.float().cpu().numpy()
            advance(len(numbers))
    return found


def counted_tokens(batch: Batch, kind: str) -> torch.Tensor:
    """Labels of a language model's batch, each at the place whose logits foretell it; IGNORED for what does not count."""
    return batch["labels"][:, 1:] if kind == CAUSAL else batch["labels"]


def counted_logits(model: Any, batch: Batch, kind: str, hidden: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits that count, (n, labels) or (tokens, vocabulary); and hidden states layer by layer, if they are wanted."""
    given = {name: tensor for name, tensor in batch.items() if name != "labels"} if kind == CAUSAL else batch
    output = model(**given, **({"output_hidden_states": True} if hidden else {}))
    states: list[torch.Tensor] = []
    for part in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states") if hidden else ():
        states += getattr(output, part, None) or ()
    logits = output.logits
    if kind in (TEXT, IMAGE):
        return logits, states
    return (logits[:, :-1] if kind == CAUSAL else logits)[counted_tokens(batch, kind) != IGNORED], states
