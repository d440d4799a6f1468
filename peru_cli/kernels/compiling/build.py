"""Python loops that numba compiles on their first call, stored as object files, and called without the GIL.

numba is imported only to compile, in a process beside this one (beside.py) where the result can be stored. Object files are loaded
through llvmlite, which takes a third of the time of importing numba.

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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.console import console
from peru_cli.kernels.compiling import objects
from peru_cli.kernels.compiling.beside import Beside

_KINDS = {
    "i1": ctypes.c_int8, "i2": ctypes.c_int16, "i4": ctypes.c_int32, "i8": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u2": ctypes.c_uint16, "u4": ctypes.c_uint32, "u8": ctypes.c_uint64,
    "f4": ctypes.c_float, "f8": ctypes.c_double,
}  # fmt: skip
_lock = threading.RLock()
_engines: list[Any] = []  # the owners of the machine code
_told = False
_beside = Beside()


def _begin_anew() -> None:
    """A fork has no thread that listens to the process beside its parent."""
    global _beside
    _beside = Beside()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@cache
def _host() -> tuple[Any, str, str, str, str]:
    """LLVM, its version, and the machine and processor that code is made for."""
    import llvmlite
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm, llvmlite.__version__, llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _machine() -> Any:
    llvm, _, _, cpu, features = _host()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _path(name: str) -> Path | None:
    _, version, *host = _host()
    return objects.path_of(name, version, *host)


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
        return _path(self.name)

    def is_stored(self) -> bool:
        """Whether the object file is there, or has been loaded. Asked for every block, so looked up until it is."""
        self._stored = self._stored or self._entry is not None or objects.load(self.path) is not None
        return self._stored

    def load(self) -> Callable[..., int]:
        """The machine code, loaded from the cache or compiled now."""
        if (code := objects.load(self.path)) is None:
            compile_beside([self])
            _beside.wait(self.where)
            code = self.make()
        with _lock:
            if self._entry is None:
                llvm, _, _, _, _ = _host()
                engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
                engine.add_object_file(llvm.ObjectFileRef.from_data(code))
                engine.finalize_object()
                _engines.append(engine)
                taken: list[Any] = [ctypes.c_void_p if word[0] == "*" else _KINDS[word] for word in self._words]
                prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *taken)
                self._entry = prototype(engine.get_function_address(objects.SYMBOL))
            return self._entry

    def make(self) -> bytes:
        """The object file: the stored one, or compiled in this process and stored."""
        path = self.path
        if (code := objects.load(path)) is None:
            _tell()
            from peru_cli.kernels.compiling.compile import object_file

            code = object_file(self.name, self._function, self._words, self._bound, _machine())
            objects.store(path, code)
        return code


def begin_beside() -> None:
    """Start the process beside this one if this machine has no compiled loops yet: it loads numba while this one opens its inputs."""
    any_loop = _path("*")
    if any_loop is not None and objects.can_store(any_loop) and not any(any_loop.parent.glob(any_loop.name)):
        _beside.begin()


def compile_beside(loops: Sequence[Kernel]) -> None:
    """Begin to compile what is not stored, in this order, in a process beside this one. A call of such a loop waits for it.

    Where nothing can be stored it would be of no use, and is not started."""
    missing = [loop for loop in loops if not loop.is_stored()]
    if missing and objects.can_store(missing[0].path):
        _tell()
        _beside.ask([loop.where for loop in missing])


def at_once(loops: Sequence[Kernel]) -> bool:
    """Whether loops can run without waiting for the process that compiles them, which begins now if they were never compiled."""
    compile_beside(loops)
    return all(loop.is_stored() or _beside.is_done(loop.where) for loop in loops)


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
