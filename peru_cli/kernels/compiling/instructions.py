"""What loops do in one step and Python has no word for: LLVM's own operations on several entries, or on the bits of a word.

Each is made when a loop that uses it is compiled, so that numba need not be imported before."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

TOGETHER = 64  # entries whose flags are one word


class Instruction:
    """A function that loops may call. `made` is what numba compiles."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @cached_property
    def made(self) -> Any:
        """numba's intrinsic."""
        return self._make()

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError("only compiled loops can call this")


def _flags(test: str, with_number: bool) -> Callable[[], Any]:
    """Makes a function of an array, another one or a number, and a place: the results of a comparison of 64 entries from there on."""

    def make() -> Any:
        from llvmlite import ir
        from numba.core import types
        from numba.extending import intrinsic

        @intrinsic
        def compared(typing: Any, first: Any, second: Any, start: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                entry = context.get_value_type(first.dtype)
                entries = ir.VectorType(entry, TOGETHER)

                def loaded(array: Any) -> Any:
                    place = builder.bitcast(builder.gep(array, [arguments[2]]), entries.as_pointer())
                    return builder.load(place, align=first.dtype.bitwidth // 8)

                if with_number:
                    one = builder.insert_element(ir.Constant(entries, ir.Undefined), arguments[1], ir.Constant(ir.IntType(32), 0))
                    other = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), TOGETHER), None))
                else:
                    other = loaded(arguments[1])
                compare = builder.icmp_signed if first.dtype.signed else builder.icmp_unsigned
                return builder.bitcast(compare(test, loaded(arguments[0]), other), ir.IntType(TOGETHER))

            return types.uint64(first, first.dtype if with_number else second, start), code

        return compared

    return make


def _lowest() -> Any:
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    @intrinsic
    def lowest(typing: Any, word: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

        return types.int64(types.uint64), code

    return lowest


# Flags are a uint64, that of the first entry in the lowest bit. `i` is the place of the first of the 64 entries.
differing: Any = Instruction(_flags("!=", with_number=False))  # (a, b, i): which entries of a and b differ
reaching: Any = Instruction(_flags(">=", with_number=True))  # (a, number, i): which entries are at least a number
lowest: Any = Instruction(_lowest)  # (flags): the number of the lowest flag that is set, int64; there must be one
