"""Install routed experts in a model in memory, and take them out again.

    smile = peru_cli.open_artifact("smile.safetensors")
    applied = peru_cli.apply(model, smile)           # every linear layer adds the experts that its input chooses
    logits = model(**inputs).logits
    applied.routing.task(0), applied.routing.shares  # which task answered, and how sure the router was
    applied.restore()

What a method does to the layers is in its own module (smile.py, wemoe.py). Layers get forward hooks, which `restore` removes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from peru_cli.artifacts.packs.routed import LinearLayer, Routed
from peru_cli.checkpoints.pairing import find_prefix
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.fine_tune import Origin
from peru_cli.finetunes.pack_task import base_of_pack
from peru_cli.live.applied import Applied, as_loaded, base_tensors, match, verify_base
from peru_cli.live.memory import TensorTable, infos
from peru_cli.live.owners import Claim
from peru_cli.methods.compact.routed import of_method

if TYPE_CHECKING:
    from torch import nn

_SHOWN = 3
_Tables = Mapping[int, Mapping[str, Tensor]]  # tasks' own tensors of one module, by the task's number and the attribute


@dataclass(frozen=True)
class Routing:
    """How the last forward pass was routed: `tasks` by name, `shares` float (inputs, tasks), each row adding up to 1."""

    tasks: tuple[str, ...]
    shares: Tensor

    @property
    def chosen(self) -> Tensor:
        """The task of each input: the one with the largest share, as a number; int64 (inputs,)."""
        return self.shares.argmax(1)

    def task(self, number: int) -> str:
        """The task of an input."""
        return self.tasks[int(self.chosen[number])]


class AppliedRouted(Applied):
    """Routed experts in a model. `routing` says how the last forward pass was routed. `restore` takes them out.

    `head` makes all inputs use one task's own tensors, whatever the router says; None lets the router choose."""

    def __init__(self, claim: Claim | None, model: nn.Module, routed: Routed) -> None:
        super().__init__(claim, model)
        self.artifact, self.tasks = routed, tuple(routed.tasks)
        self.routing: Routing | None = None
        self.head: str | None = None
        self._hooks: list[Any] = []
        self._shares: Tensor | None = None  # sum over layers so far, (inputs, tasks)
        self._layers = 0
        self.inputs: int | None = None  # how many the forward pass that runs has
        self._mask: Tensor | None = None
        self._names = _argument_names(model)
        self._after: list[Callable[[], None]] = []
        self.installed: Any = None  # what the method put in
        self._has_heads = False

    # -- installing --------------------------------------------------------------------------------------

    def begin(self, model: nn.Module) -> None:
        """Watch the model's forward passes from now on. Before any layer is hooked."""
        self._hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def end(self, model: nn.Module) -> None:
        """Take stock after each forward pass. After all layers are hooked."""
        self._hooks.append(model.register_forward_hook(self._end, always_call=True))

    def hook(self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Let a layer's output be `change(input, output)`."""

        def changed(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            return change(arguments[0] if arguments else next(iter(named.values())), output)

        self._hooks.append(module.register_forward_hook(changed, with_kwargs=True))

    def after(self, call: Callable[[], None]) -> None:
        """Call this at the end of every forward pass."""
        self._after.append(call)

    def add_heads(self, heads: Mapping[nn.Module, Mapping[int, Mapping[str, Tensor]]]) -> None:
        """Let modules use the tensors of the task that an input chose: by module and the task's number, tensors by attribute."""
        self._has_heads = bool(heads)
        for module, tables in heads.items():
            self._hooks.append(module.register_forward_hook(partial(self._answer, dict(tables)), with_kwargs=True))

    # -- hooks -------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = dict(zip(self._names, arguments, strict=False)) | named
        if self._has_heads and given.get("labels") is not None:
            raise UsageError("a model whose tasks have heads of their own computes no loss while it is routed", "pass no labels")
        first = next((value for value in given.values() if isinstance(value, torch.Tensor)), None)
        mask = given.get("attention_mask")
        self.inputs = len(first) if first is not None and first.dim() else None
        self._mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        self._shares, self._layers, self.routing = None, 0, None

    def _end(self, model: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.routing = Routing(self.tasks, self._means()) if self._shares is not None else None
        self._shares, self._layers, self.inputs, self._mask = None, 0, None, None
        for call in self._after:
            call()

    def count(self, shares: Tensor) -> None:
        """Add one layer's shares, averaged over the tokens of each input without padding; (inputs, ..., tasks)."""
        if shares.dim() < 2 or (self.inputs is not None and len(shares) != self.inputs):
            return  # a layer that sees something else than one row an input: routed, but not counted
        means = self.over_tokens(shares)
        self._shares = means if self._shares is None else self._shares + means.to(self._shares)
        self._layers += 1

    def over_tokens(self, values: Tensor) -> Tensor:
        """The mean over the tokens of each input that are no padding; (inputs, ..., n) -> (inputs, n)."""
        tokens = values.reshape(len(values), -1, values.shape[-1])
        if self._mask is not None and self._mask.shape == tokens.shape[:2]:
            weights = self._mask.to(tokens)[..., None]
            return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
        return tokens.mean(1)

    def _means(self) -> Tensor:
        assert self._shares is not None
        return self._shares / self._layers

    def _answer(self, tables: _Tables, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        """The outputs of a module under each input's task: (inputs, ..., width). Shorter rows end in -infinity."""
        inputs: Tensor = arguments[0] if arguments else next(iter(named.values()))
        if self.head is not None:
            chosen = torch.full((len(inputs),), self.tasks.index(self.head), device=inputs.device)
        elif self._shares is None or len(self._shares) != len(inputs):
            raise UsageError(f"a {type(module).__name__} of the tasks' own runs before any routed layer", "the router has not chosen yet")
        else:
            chosen = self._means().argmax(1).to(inputs.device)
        rows, parts = [], []
        for number in sorted(set(chosen.tolist())):
            mine = torch.where(chosen == number)[0]
            rows.append(mine)
            if number in tables:
                with _unhooked(module):
                    parts.append(
                        functional_call(module, {name: tensor.to(output) for name, tensor in tables[number].items()}, (inputs[mine],))
                    )
            else:
                parts.append(output[mine])
        width = max(part.shape[-1] for part in parts)
        found = output.new_full((*output.shape[:-1], width), -math.inf)
        for mine, part in zip(rows, parts, strict=True):
            found[mine, ..., : part.shape[-1]] = part
        return found

    def restore(self) -> None:
        """Take the experts out, as Applied.restore does. No weight was changed."""
        if self._claim is not None:
            self._claim.check_last()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        super().restore()


class _unhooked:  # noqa: N801 - used like a function
    """A module without its forward hooks, so that it can be called from one of them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._before = self._module._forward_hooks.copy()
        self._module._forward_hooks.clear()

    def __exit__(self, *exc: object) -> None:
        self._module._forward_hooks.update(self._before)


def _argument_names(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def apply_routed(model: nn.Module, table: MutableMapping[str, Tensor], routed: Routed, claim: Claim | None, verify: bool) -> AppliedRouted:
    """Install routed experts in the base in memory; see `peru_cli.apply`."""
    origins = {o.info.name: Origin(o.info, o.base, o.digest, o.info.name in routed.held) for o in base_of_pack(routed)}
    names = match(table, origins, routed, True)
    if verify:
        base = TensorTable("the model", {})
        base.add(base_tensors(table, origins, names))
        verify_base(base, origins, names, routed)
    return install(model, table, routed, claim, names)


def install(
    model: nn.Module, table: MutableMapping[str, Tensor], routed: Routed, claim: Claim | None = None,
    names: Mapping[str, str] | None = None, experts: bool = True,
) -> AppliedRouted:  # fmt: skip
    """Install routed experts without a look at the base's values: any dtype will do.

    Args:
        names: the model's names of the base's tensors; found by shape if they are not given.
        experts: False only counts what the routers say; tasks' own tensors are left out. Where routers need no experts, the base's own
            activations are what they see.

    Raises Mismatch if a layer is not there, or is a module that does not multiply by its weight."""
    names = _find(table, routed) if names is None else names
    applied = AppliedRouted(claim, model, routed)
    try:
        applied.begin(model)
        applied.installed = of_method(routed.method, "live").add(applied, model, table, names, experts)
        applied.end(model)
        if experts:
            applied.add_heads(_heads(model, routed))
    except BaseException:
        applied.restore()
        raise
    return applied


def find_modules(
    model: nn.Module, table: Mapping[str, Tensor], names: Mapping[str, str], layers: Sequence[LinearLayer], routed: Routed
) -> list[list[nn.Module]]:
    """The modules that multiply by each layer's weight. Mismatch if there are none, or they do something else with it."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            owners.setdefault(id(weight), []).append(module)
    places, problems = [], []
    for layer in layers:
        modules = owners.get(id(table.get(names[layer.weight.name])), [])
        wrong = [module for module in modules if _orientation(module) != layer.transposed]
        if wrong or not modules:
            kind = type(wrong[0]).__name__ if wrong else "no module of its own"
            problems.append(f"{layer.weight.name}: {kind}")
        places.append(modules)
    if problems:
        raise Mismatch(
            f"{routed.path} routes linear layers, and some are not in this model: {'; '.join(problems[:_SHOWN])}",
            "make it with --exclude REGEX for these layers",
        )
    return places


def _find(table: Mapping[str, Tensor], routed: Routed) -> dict[str, str]:
    """The model's names of the base's tensors, by names and shapes."""
    wanted, present = {tensor.info.name: tensor.info for tensor in routed.index.tensors}, infos(table)
    prefix = find_prefix(wanted, present)
    found = {}
    for own in sorted(routed.held):
        name = as_loaded(prefix.base_name(own), present)
        if name is None or name not in present or present[name].shape != wanted[own].shape:
            raise Mismatch(f"{routed.path} does not fit this model: it has no {own} of {list(wanted[own].shape)}")
        found[own] = name
    return found


def _orientation(module: nn.Module) -> bool | None:
    """Whether a linear module stores its weight as (in, out). None if it is not linear."""
    if type(module) is torch.nn.Linear:
        return False
    return True if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.") else None


def _heads(model: nn.Module, routed: Routed) -> dict[nn.Module, dict[int, dict[str, Tensor]]]:
    """Tasks' own tensors by the module that uses them, the task's number, and the attribute's name. BadFile if one was altered."""
    modules, found, missing = dict(model.named_modules()), dict[Any, dict[int, dict[str, Tensor]]](), set[str]()
    for number, task in enumerate(routed.index.tasks):
        for own in task.tensors:
            path, _, leaf = own.info.name.rpartition(".")
            module = modules.get(path)
            if module is None or not isinstance(getattr(module, leaf, None), torch.Tensor) or list(module.children()):
                missing.add(own.info.name)
                continue
            routed.verify_whole(task, own)
            data = bytearray(own.info.nbytes)
            routed.read_whole(task, own, 0, memoryview(data))
            tensor = torch.frombuffer(data, dtype=getattr(torch, own.info.dtype.torch_name or "")).view(own.info.shape)
            found.setdefault(module, {}).setdefault(number, {})[leaf] = tensor
    if missing:
        raise Mismatch(
            f"the tasks of {routed.path} have tensors of their own that this model has no place for: {', '.join(sorted(missing)[:_SHOWN])}",
            "load the base as the class of the fine-tunes, such as AutoModelForSequenceClassification",
        )
    return found
