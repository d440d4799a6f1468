"""Build transformers models from tensors, and infer from names and shapes what they are and need.

Nothing here knows of artifacts: inference/eval_model.py turns what a user names into tensors and side files."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from peru_cli.console import console, plural
from peru_cli.errors import BadFile, Mismatch, UsageError
from peru_cli.inference.data import Examples
from peru_cli.inference.remote_code import auto_map, code_for, register_models
from peru_cli.shown import listed

TEXT, IMAGE, CAUSAL, SEQ2SEQ = "text classification", "image classification", "causal language model", "seq2seq language model"
ITSELF = "model"  # whatever class its config names
CLASSES, LABELS, VALUE = "classes", "independent labels", "a value"  # the purpose of a classifier's head
_AUTO = {
    TEXT: transformers.AutoModelForSequenceClassification,
    IMAGE: transformers.AutoModelForImageClassification,
    CAUSAL: transformers.AutoModelForCausalLM,
    SEQ2SEQ: transformers.AutoModelForSeq2SeqLM,
}
_OFTEN_ABSENT = ("position_ids", "lm_head.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")

Files = Mapping[str, bytes]
Shapes = Mapping[str, tuple[int, ...]]
_T = TypeVar("_T")
_SHAPES: dict[str, dict[str, torch.Size]] = {}  # of models seen so far: building one takes longer than a batch


def pick_device(device: str) -> torch.device:
    """Parse `auto`, `cpu`, `cuda` or `cuda:N`. UsageError if the device does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        if picked.type not in ("cpu", "cuda") or (picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count()):
            raise RuntimeError
    except RuntimeError as error:
        raise UsageError(f"--device {device!r} is not auto, cpu, cuda or cuda:N, or there is no such GPU", "use --device cpu") from error
    return picked


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside; restores its settings afterwards."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def folder(files: Files) -> Iterator[Path]:
    """A temporary folder with side files for transformers; never weights."""
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="peru-") as place:
        for name, content in files.items():
            (Path(place) / name).write_bytes(content)
        yield Path(place)


def load_config(files: Files, label: str) -> Any:
    """The transformers config among side files. BadFile if there is none, or transformers does not know it.

    Code that it names runs only under `trusting` (remote_code.py)."""
    if "config.json" not in files:
        raise BadFile(f"{label}: no config.json, so transformers cannot tell what the model is", "name the model's folder")
    named, code = auto_map(files["config.json"]), code_for(files)
    with folder({"config.json": files["config.json"], **code}) as place:
        try:
            config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=bool(code))
            if code:
                config = register_models(config, named, place, _AUTO.values())
        except Exception as error:
            if code:
                raise BadFile(f"{label}: its own Python code could not be loaded ({reason(error)})") from error
            if not isinstance(error, (ValueError, OSError, KeyError)):
                raise
            if named:
                raise BadFile(
                    f"{label}: it needs its own Python code, which peru does not run",
                    "add --trust-remote-code to run it, after reading it: such code can do anything that you can",
                ) from error
            raise BadFile(f"{label}: transformers does not know its config.json ({reason(error)})") from error
    if code:
        console.warn(f"{label}: its own Python code is run ({listed(sorted(code))})")
    elif named:
        console.note(
            f"{label}: its config.json names its own Python code (auto_map), which peru does not run; transformers' own model is used"
        )
    return config


def kind_of(examples: Examples, config: Any, label: str) -> str:
    """What the examples need and the model is: one of TEXT, IMAGE, CAUSAL, SEQ2SEQ. Mismatch if those differ."""
    if examples.images is not None:
        return IMAGE
    named = " ".join(config.architectures or [])
    language = SEQ2SEQ if config.is_encoder_decoder else CAUSAL
    is_language = any(part in named for part in ("CausalLM", "LMHead", "ConditionalGeneration", "Seq2SeqLM"))
    if examples.targets is not None:
        if not is_language:
            raise Mismatch(f"{examples.source} has targets, so a language model is needed; {label} is a {named or config.model_type}")
        return language
    if examples.labels is not None:
        if is_language:
            raise Mismatch(f"{examples.source} has labels, so a classifier is needed; {label} is a language model, {named}")
        return TEXT
    if is_language and language == SEQ2SEQ:
        raise Mismatch(f"{label} is {named}: it needs targets, and {examples.source} has none", 'write {"text": "...", "target": "..."}')
    return CAUSAL if is_language else TEXT


def problem_of(config: Any) -> str:
    """What a classifier's outputs are, as transformers reads its config: CLASSES, LABELS (independent) or VALUE (a regression)."""
    said = getattr(config, "problem_type", None)
    if said == "multi_label_classification":
        return LABELS
    return VALUE if said == "regression" or config.num_labels == 1 else CLASSES


def fit_labels(config: Any, kind: str, shapes: Shapes) -> None:
    """Set a config's number of labels to that of the head among the tensors: the config of a base or a merge counts another head's."""
    if kind not in (TEXT, IMAGE):
        return
    expected, prefix = _expected(config, kind, "")
    for name, shape in expected.items():
        found = shapes.get(name)
        if found is None or not shape or name.startswith(prefix) or shape[0] != config.num_labels:
            continue
        if found[1:] == shape[1:] and found[0] != shape[0]:
            config.num_labels = found[0]
            return


def require_shapes(config: Any, kind: str, shapes: Shapes, label: str) -> None:
    """Mismatch if names and shapes show that the tensors do not make such a model.

    Only a missing head of a classifier is detected here: transformers renames tensors of some architectures on loading."""
    expected, prefix = _expected(config, kind, label)
    named = _under_prefix(shapes, expected, prefix)
    wrong = [f"{name}: {list(shape)}, the config says {list(expected[name])}" for name, shape in named.items()
             if name in expected and shape != expected[name]]  # fmt: skip
    if wrong:
        raise Mismatch(f"{label} does not match its config in {plural(len(wrong), 'tensor')}\n  " + "\n  ".join(wrong[:5]))
    head = [name for name in expected if not name.startswith(prefix) and not name.endswith(_OFTEN_ABSENT)]
    if kind in (TEXT, IMAGE) and head and not any(name in named for name in head):
        raise _missing(head, kind, config, label)


def takes_attention_mask(config: Any, kind: str, label: str) -> bool:
    """Whether a model can be told which tokens are padding."""
    return "attention_mask" in inspect.signature(_model_class(config, kind, label).forward).parameters


def _under_prefix(found: Mapping[str, _T], expected: Mapping[str, torch.Size], prefix: str) -> dict[str, _T]:
    """Tensors by the model's names. Those of an encoder may lack the prefix."""
    return {prefix + name if name not in expected and prefix + name in expected else name: value for name, value in found.items()}


def _missing(names: list[str], kind: str, config: Any, label: str) -> Mismatch:
    names = sorted(names)
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    hint = "a bare encoder has no head: name the fine-tune, or pass it with --against" if kind in (TEXT, IMAGE) else None
    return Mismatch(f"{label}: no weights for {listed}, which a {_model_class(config, kind, label).__name__} needs", hint)


def _expected(config: Any, kind: str, label: str) -> tuple[dict[str, torch.Size], str]:
    """Names and shapes of the tensors of a model of this kind, and the prefix of its encoder's names."""
    cls = _model_class(config, kind, label)
    key = f"{cls.__name__} {config.to_json_string()}"
    if key not in _SHAPES:
        with torch.device("meta"), quiet_transformers():
            _SHAPES[key] = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
    return _SHAPES[key], f"{cls.base_model_prefix}."


def _model_class(config: Any, kind: str, label: str) -> Any:
    try:
        if kind == ITSELF:
            named = (config.architectures or [""])[0]
            return getattr(transformers, named, None) or transformers.AutoModel._model_mapping[type(config)]
        auto: Any = _AUTO[kind]
        return auto._model_mapping[type(config)]
    except KeyError as error:
        raise Mismatch(f"{label} is a {config.model_type}, and transformers has no such model for {kind}") from error


def build_model(
    state: Mapping[str, torch.Tensor], config: Any, kind: str, label: str, *, dtype: torch.dtype, device: torch.device,
    attention: str | None = None,
) -> Any:  # fmt: skip
    """A transformers model in evaluation mode.

    Args:
        state: tensors under their checkpoint's names. Those of an encoder may lack the model's prefix (`bert.`),
            as beside the head of a merge. Tensors of this dtype may be shared with the model.
        config: see `load_config`. `kind`: see `kind_of`.
        attention: transformers' `attn_implementation`; None for its own choice.

    Raises:
        Mismatch: the tensors do not make such a model: one is missing (a head, say), or has another shape."""
    require_shapes(config, kind, {name: tuple(tensor.shape) for name, tensor in state.items()}, label)
    named = _under_prefix(state, *_expected(config, kind, label))
    cls = _model_class(config, kind, label)
    more = {} if attention is None else {"attn_implementation": attention}
    with quiet_transformers():
        model, info = cls.from_pretrained(None, config=config, state_dict=named, dtype=dtype, output_loading_info=True, **more)
    # A tied head has no tensor of its own. A head that the config does not tie would be random, and different in every run.
    weights = dict(model.named_parameters(remove_duplicate=False))
    read = {weight.data_ptr() for name, weight in weights.items() if name not in info["missing_keys"]}
    missing = sorted(name for name in info["missing_keys"] if name in weights and weights[name].data_ptr() not in read)
    if kind == ITSELF:  # a base may have been saved without its pooler or head, on which nothing inside depends
        parts = {name.removeprefix(f"{cls.base_model_prefix}.").partition(".")[0] for name in named}
        missing = [name for name in missing if name.removeprefix(f"{cls.base_model_prefix}.").partition(".")[0] in parts]
    if missing:
        raise _missing(missing, kind, config, label)
    return model.eval().requires_grad_(False).to(device)


def reason(error: Exception) -> str:
    """The first informative line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
