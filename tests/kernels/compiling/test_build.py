"""How loops are compiled, cached and loaded again: never a failure, never a rounding that NumPy does not make."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from copy import copy
from pathlib import Path

import numpy as np
import pytest

from peru_cli.kernels import random
from peru_cli.kernels.compiling import beside, build, objects
from peru_cli.kernels.compiling.beside import Beside
from peru_cli.kernels.compiling.build import kernel
from peru_cli.kernels.merging import verbs

DRAW = """
import sys
from peru_cli.kernels.random import words
print(words((0, 0), 0, 4).tolist(), "numba" in sys.modules)
"""
FIRST = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def _multiply_add(a, b, c, out, n):
    for i in range(n):
        out[i] = a[i] * b[i] + c[i]


def _add_up(a, n, out):
    total = a[0]
    for i in range(1, n):
        total += a[i]
    out[0] = total


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path / "peru"


def draw() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DRAW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_products_and_sums_are_rounded_one_by_one(folder: Path) -> None:
    """A fused multiply-add rounds once, and other machines may sum in another order: neither equals NumPy."""
    noise = np.random.default_rng(0)
    a, b, c = (noise.standard_normal(4099).astype(np.float32) for _ in range(3))
    out = np.empty_like(a)
    kernel("*f4 *f4 *f4 *f4 i8")(_multiply_add)(a, b, c, out, len(a))
    assert np.array_equal(out, a * b + c)
    exact = (a.astype(np.float64) * b + c).astype(np.float32)
    assert not np.array_equal(out, exact)  # a fused one would nearly always give this
    total = np.empty(1, np.float32)
    kernel("*f4 i8 *f4")(_add_up)(a, len(a), total)
    assert total[0] == np.add.accumulate(a)[-1]


def test_memory_of_another_width_or_with_gaps_is_refused(folder: Path) -> None:
    add = kernel("*f4 i8 *f4")(_add_up)
    for wrong in (np.zeros(4), np.zeros(8, np.float32)[::2]):
        with pytest.raises(TypeError, match="contiguous entries of 4 bytes"):
            add(wrong, 4, np.zeros(1, np.float32))


def test_two_processes_at_once_and_a_third_that_needs_no_numba(folder: Path) -> None:
    both = [draw(), draw()]
    for process in both:
        out, said = process.communicate(timeout=120)
        assert out.split("] ")[0] + "]" == str(FIRST), said
        assert "compiling loops" in said
    assert [path.suffix for path in folder.iterdir()] == [".o"]
    out, said = draw().communicate(timeout=120)
    assert out == f"{FIRST} False\n" and not said


@pytest.fixture
def draws(monkeypatch) -> build.Kernel:
    """The loop of random words, as a process has it that has not called it yet."""
    monkeypatch.setattr(build, "_beside", Beside())
    loop = copy(random._words)
    loop._entry, loop._stored = None, False
    return loop


def test_a_process_beside_compiles_and_a_call_waits_for_it(folder: Path, draws: build.Kernel, monkeypatch) -> None:
    assert not build.at_once([draws])  # it begins
    monkeypatch.setitem(sys.modules, "peru_cli.kernels.compiling.compile", None)  # this process cannot compile
    out = np.empty(2, np.uint64)
    draws(0, 0, 0, 0, 0, 1, out)
    assert out.view(np.uint32).tolist() == FIRST
    assert build.at_once([draws]) and [path.suffix for path in folder.iterdir()] == [".o"]


def test_no_process_begins_where_it_could_store_nothing(folder: Path, draws: build.Kernel) -> None:
    folder.write_text("a file where the folder should be")
    assert build.at_once([draws]) and build._beside._process is None


def test_a_process_beside_that_fails_is_replaced(folder: Path, draws: build.Kernel, monkeypatch) -> None:
    monkeypatch.setattr(beside, "_PROGRAM", "1 / 0")
    build.compile_beside([draws])
    build._beside.wait(draws.where)
    assert build.at_once([draws])
    out = np.empty(2, np.uint64)
    draws(0, 0, 0, 0, 0, 1, out)
    assert out.view(np.uint32).tolist() == FIRST


def test_untrusted_or_unwritable_object_files_are_compiled_again(folder: Path) -> None:
    def answer() -> object:
        total = np.empty(1, np.float32)
        kernel("*f4 i8 *f4")(_add_up)(np.ones(3, np.float32), 3, total)
        return total[0]

    assert answer() == 3
    (kept,) = folder.iterdir()
    good = kept.read_bytes()
    kept.write_bytes(good[:-1] + b"?")
    assert objects.load(kept) is None and answer() == 3 and objects.load(kept) is not None
    kept.chmod(0o666)  # anybody could have written it
    assert objects.load(kept) is None
    kept.unlink()
    folder.rmdir()
    folder.write_text("a file where the folder should be")
    assert answer() == 3


def test_without_a_home_loops_stay_in_memory(monkeypatch) -> None:
    monkeypatch.setattr(objects, "_folder", lambda: Path("~nobody-of-that-name").expanduser())
    assert objects.path_of("x") is None and objects.load(None) is None
    objects.store(None, b"")


def test_every_loop_has_a_unique_name() -> None:
    """Files use it as their name, and their contents are trusted."""
    seen: list[str] = []
    modules = [module.name for module in pkgutil.walk_packages([str(Path(build.__file__).parents[1])], "peru_cli.kernels.")]
    assert "peru_cli.kernels.merging.verbs" in modules
    for module in modules:
        for found in vars(importlib.import_module(module)).values():
            seen += [found.name] if isinstance(found, build.Kernel) else []
            seen += [loop.name for loop in found._loops.values()] if isinstance(found, build.Kernels) else []
    assert len(seen) == len(set(seen)) > 0


FORK = """
import os, sys
from peru_cli.kernels import random
from peru_cli.kernels.compiling import build
build.compile_beside([random._words])
if not os.fork():
    print(random.words((0, 0), 0, 4).tolist(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
def test_a_fork_has_a_process_of_its_own(folder: Path) -> None:
    """Nobody listens in the fork to the process that its parent began: it would wait for ever."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{FIRST}\n", done.stderr


def test_several_loops_are_compiled_in_one_process_beside(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "_beside", Beside())
    loops = [copy(loop) for loop in (random._words, random._below, verbs._disjoint["f4"])]
    for loop in loops:
        loop._entry, loop._stored = None, False
    build.compile_beside(loops)
    for loop in loops:
        build._beside.wait(loop.where)
    assert all(loop.is_stored() for loop in loops) and len(list(folder.iterdir())) == 3


def test_it_begins_early_only_where_no_loop_is_stored(folder: Path, draws: build.Kernel) -> None:
    build.begin_beside()
    first = build._beside._process
    assert first is not None and not build.at_once([draws]) and build._beside._process is first
    build._beside.wait(draws.where)
    build._beside = Beside()
    build.begin_beside()
    assert build._beside._process is None and draws.is_stored()
