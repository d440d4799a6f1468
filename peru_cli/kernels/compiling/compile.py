"""numba makes machine code of a Python loop: an object file without the wrappers that Python needs to call it.

Nothing is reordered or fused (no fastmath): every sum and product is rounded as NumPy rounds it, so the results have the same bits on
every processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np

from peru_cli.kernels.compiling.instructions import Instruction
from peru_cli.kernels.compiling.objects import SYMBOL

_LIBRARY = {"memset", "memcpy", "memmove"}  # functions that compiled loops may call: every process has them
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # only loops call loops
_types: Any = numba.types


def warm_up() -> None:
    """Load numba's tables, which it does with its first function."""
    with _unoptimised():
        numba.njit((_types.int64,), nogil=True, **_OPTIONS)(abs_of)


def abs_of(number: Any) -> Any:
    """|number|, a function to compile."""
    return number if number > 0 else -number


def object_file(
    name: str, function: Callable[..., Any], words: Sequence[str], bound: Mapping[str, Any], machine: llvm.TargetMachine
) -> bytes:
    """A loop's object file for a machine. `words` and `bound` as in build.py: the types of its arguments, and the names to replace."""
    # Functions that it calls are inlined, so a later process has no symbols to resolve.
    with _unoptimised():
        compiled: Any = numba.njit(tuple(map(_typed, words)), nogil=True, **_OPTIONS)(_with_functions(function, bound))
    signature = compiled.signatures[0]
    module = llvm.parse_assembly(compiled.inspect_llvm(signature))
    wanted = compiled.overloads[signature].fndesc.llvm_func_name
    for each in module.functions:
        if each.name == wanted:
            each.name = SYMBOL
        elif not each.is_declaration:
            each.linkage = "internal"
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    foreign = {each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")} - _LIBRARY
    assert not foreign, f"{name} calls {foreign}"
    return bytes(machine.emit_object(module))


def _typed(word: str) -> Any:
    return _types.CPointer(_typed(word[1:])) if word[0] == "*" else getattr(_types, np.dtype(word).name)


def _with_functions(function: Callable[..., Any], bound: Mapping[str, Any]) -> Callable[..., Any]:
    """The loop with names bound, and the Python functions that it uses compiled."""
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, **bound}
    for name in function.__code__.co_names:
        if isinstance(names.get(name), FunctionType):
            names[name] = numba.njit(forceinline=True, **_OPTIONS)(_with_functions(names[name], bound))
        elif isinstance(names.get(name), Instruction):
            names[name] = names[name].made
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


@contextmanager
def _unoptimised() -> Iterator[None]:
    """numba optimises nothing inside: it would optimise each function, and the whole is optimised in the end."""
    from numba.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        config: Any = numba.config
        before = config.OPT
        config.OPT = type(before)(0)
        try:
            yield
        finally:
            config.OPT = before
