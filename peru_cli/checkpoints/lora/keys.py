"""How LoRA files name their tensors: PEFT's layout, kohya's (sd-scripts) and diffusers'.

PEFT       base_model.model.MODULE.lora_A.weight, .lora_B.weight (and .lora_B.bias, .lora_magnitude_vector),
           .lora_embedding_A, .lora_embedding_B; everything else is a tensor that it holds whole
kohya      MODULE_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .alpha, .dora_scale
diffusers  COMPONENT.MODULE.lora_A.weight, .lora_B.weight; older: .lora.down.weight, .lora_linear_layer.down.weight,
           .processor.to_q_lora.down.weight and .up; sometimes .alpha

Files of the last two kinds may also hold LyCORIS' products (LoHa: .hada_w1_a and so on, LoKr: .lokr_w1 and so on) and entries
that are added or replace the base's (ComfyUI's loader, LyCORIS' `full` and `norm`): .diff and .w_norm are added to a weight,
.diff_b and .b_norm to a bias, .set_weight replaces a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from peru_cli.errors import BadFile, UsageError

OUTER = "base_model.model."
PEFT, KOHYA, DIFFUSERS = "peft", "kohya", "diffusers"

_PEFT = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(weight|bias))?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
_FILE = re.compile(
    r"(?P<module>.+?)(?P<kind>\.lora_(?=[AB]\.)|\.lora_(?=down\.|up\.)|\.lora(?:_linear_layer)?\.|_lora\d*\.)"
    r"(?P<factor>A|B|down|up)(?:\.default)?\.weight"
)
_FILE_EXTRA = re.compile(r"(.+)\.(alpha|dora_scale|lora_magnitude_vector|lora_B\.bias)")
_PRODUCT = re.compile(r"(.+)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12]|w[12]_[ab]|t2))")
_DELTA = re.compile(r"(.+)\.(diff|diff_b|w_norm|b_norm|set_weight)")
_DELTA_ENDS = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight")
_KOHYA_NAME = re.compile(r"(lora_(unet|te\d?|transformer|prior)|lycoris)_[^.]+\.")
# Names of other low-rank methods in PEFT and LyCORIS files.
_STRANGERS = (
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.oft_|\.boft_"), "OFT"),
    (re.compile(r"\.lora_mid\."), "LoCon with a Tucker core"),
    (re.compile(r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$"), "GLoRA"),
    (re.compile(r"\.ia3_|\.on_input$"), "IA3"),
    (re.compile(r"\.vera_|vera_lambda"), "VeRA"),
    (re.compile(r"\.lora_E$|\.lora_E\."), "AdaLoRA"),
    (re.compile(r"\.lora_diag"), "KaSA"),
    (re.compile(r"\.diff(_b)?$"), "a full difference"),
    (re.compile(r"\.diff_m$"), "a difference of modulations, whose place no loader agrees on"),
    (re.compile(r"\.reshape_weight$"), "a new shape of the base's weight"),
)


@dataclass
class Keys:
    """The tensor names of one module in the file."""

    down: str | None = None  # PEFT's A
    up: str | None = None  # PEFT's B
    embedding: bool = False
    magnitude: str | None = None
    bias: str | None = None
    alpha: str | None = None


@dataclass
class Sorted:
    """A file's names: modules by their path in the file, and the tensors held whole by their plain name.

    `products` are LyCORIS' factors by their parts. `deltas` maps names in the file to what is added or replaced (module, and one
    of diff, diff_b, w_norm, b_norm, set_weight). `unknown` are entries of a single file without any known meaning."""

    layout: str
    modules: dict[str, Keys] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    products: dict[str, dict[str, str]] = field(default_factory=dict)
    deltas: dict[str, tuple[str, str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def looks_like_lora(names: Iterable[str]) -> bool:
    """Whether a file without adapter_config.json is an adapter, judged by its tensors' names."""
    # The patterns are slow, and there may be a hundred thousand names.
    likely = (name for name in names if "lora" in name or "hada_" in name or "lokr_" in name or name.endswith(_DELTA_ENDS))
    return any(pattern.fullmatch(name) for name in likely for pattern in (_FILE, _PRODUCT, _DELTA))


def sort_peft(names: Iterable[str], label: str) -> Sorted:
    """Sort the names of an adapter_model file. UsageError for other methods than LoRA, BadFile for half a pair."""
    result = Sorted(PEFT)
    for name in sorted(names):
        plain = name.removeprefix(OUTER)
        match = _PEFT.fullmatch(plain)
        magnitude = _MAGNITUDE.fullmatch(plain)
        if match:
            keys = result.modules.setdefault(match[1], Keys())
            if match[4] == "bias":
                if match[3] != "B":
                    raise BadFile(f"{label}: {name} is the bias of a lora_A, which has none")
                keys.bias = name
            else:
                _place(keys, match[3] == "A", name, label)
                keys.embedding |= match[2] is not None
        elif magnitude:
            result.modules.setdefault(magnitude[1], Keys()).magnitude = name
        elif ".lora_" in plain:
            raise UsageError(f"{label} holds {name}, which is {_stranger(plain)}", "peru knows LoRA and DoRA factors only")
        else:
            result.whole[plain] = name
    _check_pairs(result, label)
    return result


def sort_file(names: Iterable[str], label: str) -> Sorted:
    """Sort the names of a kohya or diffusers file; errors as in `sort_peft`."""
    names = sorted(names)
    kohya = any(".lora_down." in name or _KOHYA_NAME.match(name) for name in names)
    result = Sorted(KOHYA if kohya else DIFFUSERS)
    extras = []
    for name in names:
        if match := _FILE_EXTRA.fullmatch(name):
            extras.append((match[1], match[2], name))
        elif match := _FILE.fullmatch(name):
            _place(result.modules.setdefault(match["module"], Keys()), match["factor"] in ("A", "down"), name, label)
        elif match := _PRODUCT.fullmatch(name):
            result.products.setdefault(match[1], {})[match[2]] = name
        elif match := _DELTA.fullmatch(name):
            result.deltas[name] = (match[1], match[2])
        elif _stranger(name) != _UNKNOWN:
            raise UsageError(
                f"{label} holds {name}, which is {_stranger(name)}", "peru knows LoRA, DoRA, LoHa and LoKr, and plain differences"
            )
        else:
            result.whole[name] = name
            result.unknown.append(name)
    for module, what, name in extras:
        keys = result.modules.get(module)
        if what == "alpha" and module in result.products:
            result.products[module]["alpha"] = name
        elif what == "alpha" and keys is None and any(module == owner for owner, _ in result.deltas.values()):
            result.whole[name] = name  # trainers write one beside every module; a difference has no rank to divide by
        elif keys is None:
            raise BadFile(f"{label}: {name} belongs to no pair of LoRA factors")
        elif what == "alpha":
            keys.alpha = name
        elif what == "lora_B.bias":
            keys.bias = name
        else:
            keys.magnitude = name
    _check_pairs(result, label)
    return result


def _place(keys: Keys, is_down: bool, name: str, label: str) -> None:
    other = keys.down if is_down else keys.up
    if other is not None:
        raise BadFile(f"{label}: {other} and {name} are the same factor of one module")
    if is_down:
        keys.down = name
    else:
        keys.up = name


_UNKNOWN = "no LoRA factor"


def _stranger(name: str) -> str:
    return next((f"of {title}" if title[0].isupper() else title for pattern, title in _STRANGERS if pattern.search(name)), _UNKNOWN)


def _check_pairs(found: Sorted, label: str) -> None:
    halves = [
        f"{module} has {keys.down or keys.up or keys.magnitude or keys.bias} and no {'lora_A' if keys.down is None else 'lora_B'}"
        for module, keys in found.modules.items()
        if keys.down is None or keys.up is None
    ]
    if halves:
        more = f" (and {len(halves) - 1} more)" if len(halves) > 1 else ""
        raise BadFile(f"{label}: half of a pair is missing: {halves[0]}{more}", "the file is incomplete: save or download it again")
    both = sorted(set(found.modules) & set(found.products))
    if both:
        raise BadFile(f"{label}: {both[0]} has two updates: LoRA factors and {min(found.products[both[0]].values())}")
    if not found.modules and not found.products and not found.deltas:
        raise BadFile(f"{label}: no LoRA factors in it")
