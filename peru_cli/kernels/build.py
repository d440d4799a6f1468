"""Python loops that numba compiles on their first call, stored as object files, and called without the GIL.

numba is imported only to compile. Later processes load the object file through llvmlite, which takes a third of the time of
importing numba. Nothing is reordered or fused (no fastmath): every sum and product is rounded as NumPy rounds it, so the results
have the same bits on every processor.

    @kernels("*b *f4 i8", over={"BF16": {"b": "i2"}, ...})
    def widen_all(bits, out, n): ...

    widen_all["BF16"](bits, out, len(bits))

A signature has one word for each argument: `i1 i2 i4 i8 u1 u2 u4 u8 f4 f8`, with a star for an array of such entries. Arrays
must be contiguous with entries of that size. Their kind may differ: a float can be viewed as an integer. A loop returns an
integer or nothing. Functions that a loop calls are compiled with it. With `over` there is one loop for each name; the
table of that name replaces words of the signature and names in the code."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from peru_cli.console import console
from peru_cli.kernels import objects

_KINDS = {
    "i1": ctypes.c_int8, "i2": ctypes.c_int16, "i4": ctypes.c_int32, "i8": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u2": ctypes.c_uint16, "u4": ctypes.c_uint32, "u8": ctypes.c_uint64,
    "f4": ctypes.c_float, "f8": ctypes.c_double,
}  # fmt: skip
_SYMBOL = "peru_kernel"
_LIBRARY = {"memset", "memcpy", "memmove"}  # functions that compiled loops may call: every process has them
_OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}  # only other loops call a loop in numba's way
_lock = threading.RLock()
_engines: list[Any] = []  # the owners of the machine code
_told = False
_beside: dict[str, subprocess.Popen[bytes]] = {}  # by a loop's name: the process that compiles it
_COMPILE = """
import sys
from importlib import import_module
for words in sys.argv[1:]:
    module, name, *variant = words.split(" ", 2)
    found = getattr(import_module(module), name)
    (found[variant[0]] if variant else found).load()
"""


@cache
def _host() -> tuple[Any, str, str, str, str]:
    """LLVM, its version, and the machine and processor that code is made for."""
    import llvmlite
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm, llvmlite.__version__, llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _tell() -> None:
    global _told
    if not _told:
        console.note("compiling loops for this processor: a few seconds, once")
        _told = True


class Kernel:
    """One compiled loop; see the module."""

    def __init__(self, function: Callable[..., Any], signature: str, name: str, bound: Mapping[str, Any]) -> None:
        words = [stars * "*" + str(bound.get(word[stars:], word[stars:])) for word in signature.split() if (stars := word.count("*")) >= 0]
        self.name, self._function, self._bound = name, function, bound
        self._words = words
        self._sizes = [0 if word[0] != "*" else 8 if word[1] == "*" else np.dtype(word[1:]).itemsize for word in words]
        self._entry: Callable[..., int] | None = None
        self._stored = False

    def __call__(self, *arguments: Any) -> int:
        """Run the loop. TypeError for arrays that do not match the signature."""
        entry = self._entry or self.load()
        result = ctypes.c_int64(0)
        where = ctypes.addressof(result)
        error = ctypes.c_void_p()
        if entry(where, ctypes.addressof(error), *map(self._address, arguments, self._sizes)):
            raise RuntimeError(f"the loop {self.name} raised an error")  # loops cannot raise
        return result.value

    def _address(self, argument: Any, size: int) -> Any:
        if not size:
            return argument
        if argument.dtype.itemsize != size or not (argument.flags.c_contiguous and argument.flags.aligned):
            raise TypeError(f"{self.name} takes contiguous entries of {size} bytes, not {argument.dtype} with strides {argument.strides}")
        return argument.__array_interface__["data"][0]

    @property
    def where(self) -> str:
        """Words by which another process finds it."""
        name = self._function.__name__
        return f"{self._function.__module__} {name} {self.name[len(name) + 1 :]}".strip()

    @property
    def path(self) -> Path | None:
        """Where the object file belongs."""
        _, version, *host = _host()
        return objects.path_of(self.name, self.name, version, *host)

    def is_stored(self) -> bool:
        """Whether the object file is there, or has been loaded. Asked for every block, so looked up until it is."""
        self._stored = self._stored or self._entry is not None or objects.load(self.path) is not None
        return self._stored

    def _awaited(self) -> bytes | None:
        """The object file, once the process that compiles it has done so. None if it has failed, or if there is none."""
        process, code = _beside.get(self.name), None
        while process is not None and process.poll() is None and code is None:
            time.sleep(0.01)
            code = objects.load(self.path)
        return code or objects.load(self.path)

    def load(self) -> Callable[..., int]:
        """The machine code, loaded from the cache or compiled now."""
        with _lock:
            if self._entry is None:
                llvm, _, _, cpu, features = _host()
                machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
                path = self.path
                code = objects.load(path) or self._awaited()
                if code is None:
                    code = self._compile(machine)
                    objects.store(path, code)
                engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
                engine.add_object_file(llvm.ObjectFileRef.from_data(code))
                engine.finalize_object()
                _engines.append(engine)
                taken: list[Any] = [ctypes.c_void_p if word[0] == "*" else _KINDS[word] for word in self._words]
                prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *taken)
                self._entry = prototype(engine.get_function_address(_SYMBOL))
            return self._entry

    def _compile(self, machine: Any) -> bytes:
        """The object file: numba's code of this loop, without the wrappers that Python needs to call it."""
        _tell()
        import llvmlite.binding as llvm
        import numba

        types: Any = numba.types

        def typed(word: str) -> Any:
            return types.CPointer(typed(word[1:])) if word[0] == "*" else getattr(types, np.dtype(word).name)

        # Functions that it calls are inlined, so a later process has no symbols to resolve.
        with _unoptimised():
            compiled: Any = numba.njit(tuple(map(typed, self._words)), nogil=True, **_OPTIONS)(_with_functions(self._function, self._bound))
        signature = compiled.signatures[0]
        module = llvm.parse_assembly(compiled.inspect_llvm(signature))
        wanted = compiled.overloads[signature].fndesc.llvm_func_name
        for function in module.functions:
            if function.name == wanted:
                function.name = _SYMBOL
            elif not function.is_declaration:
                function.linkage = "internal"
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        builder.getModulePassManager().run(module, builder)
        foreign = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")} - _LIBRARY
        assert not foreign, f"{self.name} calls {foreign}"
        return bytes(machine.emit_object(module))


def _with_functions(function: Callable[..., Any], bound: Mapping[str, Any]) -> Callable[..., Any]:
    """The loop with names bound, and the Python functions that it uses compiled."""
    import numba

    assert isinstance(function, FunctionType)
    names = {**function.__globals__, **bound}
    for name in function.__code__.co_names:
        if isinstance(names.get(name), FunctionType):
            names[name] = numba.njit(forceinline=True, **_OPTIONS)(_with_functions(names[name], bound))
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


def compile_beside(loops: Sequence[Kernel]) -> None:
    """Begin to compile in a process of its own what is not stored, in this order. A call of such a loop waits for that process.

    It stores object files as usual, and goes on if this process ends, so that the next one finds them. Where nothing can be
    stored it would be of no use, and is not started."""
    with _lock:
        missing = [loop for loop in loops if loop.name not in _beside and not loop.is_stored()]
        if missing and _is_python() and objects.can_store(missing[0].path):
            _tell()
            package = str(Path(__file__).parents[2])
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])}
            nothing = subprocess.DEVNULL
            with suppress(OSError):
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _COMPILE, *(loop.where for loop in missing)],
                    env=environment, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True,
                )  # fmt: skip
                _beside.update(dict.fromkeys((loop.name for loop in missing), process))


def _is_python() -> bool:
    """Whether `sys.executable` is an interpreter; in a frozen program it is that program."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def at_once(loops: Sequence[Kernel]) -> bool:
    """Whether loops can run without waiting for a process that compiles them, which begins now if they were never compiled."""
    compile_beside(loops)
    return all(loop.is_stored() or (process := _beside.get(loop.name)) is None or process.poll() is not None for loop in loops)


@contextmanager
def _unoptimised() -> Iterator[None]:
    """numba optimises nothing inside: it would optimise each function, and the whole is optimised in the end."""
    import numba
    from numba.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        config: Any = numba.config
        before = config.OPT
        config.OPT = type(before)(0)
        try:
            yield
        finally:
            config.OPT = before


class Kernels:
    """One loop for each variant."""

    def __init__(self, function: Callable[..., Any], signature: str, over: Mapping[str, Mapping[str, Any]]) -> None:
        name = function.__name__
        self._loops = {what: Kernel(function, signature, f"{name}-{what}", bound) for what, bound in over.items()}

    def __getitem__(self, what: str) -> Kernel:
        return self._loops[what]

    def __iter__(self) -> Iterator[Kernel]:
        return iter(self._loops.values())


def kernel(signature: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Compile a function on its first call; see the module."""
    return lambda function: Kernel(function, signature, function.__name__, {})


def kernels(signature: str, over: Mapping[str, Mapping[str, Any]]) -> Callable[[Callable[..., Any]], Kernels]:
    """The same for several variants."""
    return lambda function: Kernels(function, signature, over)
