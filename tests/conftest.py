"""Shared tools: random checkpoints with many ties, and `peru` as its users run it."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.forkserver import ForkServer, Running

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Modules are compiled once, as in an installation, and not by every process that tests start (half a second of each `peru prune`).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models here are tiny: threads that wait for each other took a third of the time
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would everything that tests start

gc.set_threshold(50_000)  # torch and transformers make a million permanent objects: scanning them often takes a tenth of the time
forks = ForkServer()
atexit.register(forks.close)

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHARED = Path(__file__).resolve().parents[2] / "shared"  # data sets beside the developers' checkout, not part of the project


def pytest_collection_finish() -> None:
    """What has been imported by now stays: garbage is looked for among what tests make."""
    gc.freeze()


def run_peru(
    *arguments: object, stdin: bytes | None = None, env: dict[str, str] | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `python -m peru_cli` in its own process; output as text. Forked, if possible, from a process that has imported everything.

    `before` is Python code to execute first, in that process: it changes limits."""
    whole = {**os.environ, **(env or {})}
    if hasattr(os, "pidfd_open") and not any(name.startswith("PYTHON") for name in env or {}):
        return forks.run([str(a) for a in arguments], stdin or b"", whole, timeout=300, code=before)
    return subprocess.run(
        _command(arguments, before),
        capture_output=True,
        text=True,
        timeout=300,
        input=stdin.decode() if stdin is not None else None,
        env=whole,
    )


def start_peru(*arguments: object, env: dict[str, str] | None = None, before: str = "") -> Running | subprocess.Popen[str]:
    """Start a command that the test will kill, forked like those of `run_peru`."""
    whole = {**os.environ, **(env or {})}
    if hasattr(os, "pidfd_open"):
        return forks.start([str(a) for a in arguments], b"", whole, before)
    return subprocess.Popen(_command(arguments, before), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=whole)


def _command(arguments: Sequence[object], before: str) -> list[str]:
    return [sys.executable, "-c", f"{before}\nfrom peru_cli.__main__ import main\nmain()", *map(str, arguments)]


@pytest.fixture
def peru() -> Callable[..., str]:
    """Run a command in this process and return its stdout. Fails the test if the exit code is not `code`."""
    import contextlib
    import io

    from peru_cli import cli
    from peru_cli.console import console

    def call(*arguments: object, code: int = 0) -> str:
        console.quiet = console.json = console.data_on_stderr = False
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = cli.run([str(a) for a in arguments])
        assert got == code, f"exit {got}, not {code}\n{out.getvalue()}\n{err.getvalue()}"
        call.stderr = err.getvalue()  # type: ignore[attr-defined]
        return out.getvalue()

    return call


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if not mounted or mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip() if mounted else 'there is no mount'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def random_pair(dtype: str, seed: int = 0, base_dtype: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base and a fine-tune with unequal tensors, few distinct differences (many ties) and unchanged entries."""
    noise = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (701, 48),
        "layers.0.mlp.weight": (96, 130),
        "layers.0.norm.weight": (96,),
        "layers.1.mlp.weight": (96, 130),
        "layers.10.mlp.weight": (33, 7),
        "scalar": (),
        "empty": (0, 5),
    }
    base, fine = {}, {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=noise, dtype=torch.float64) * 0.1
        steps = torch.randint(-6, 7, shape, generator=noise).double() * 2.0**-9
        base[name] = weight.to(FLOATS[base_dtype or dtype])
        fine[name] = (base[name].double() + steps).to(FLOATS[dtype])
    base["position_ids"] = torch.arange(77)
    fine["position_ids"] = torch.arange(77)
    return base, fine


def save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    """Write a plain safetensors file with the reference writer."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, including NaN payloads."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same_tensors(got: Path, expected: dict[str, torch.Tensor]) -> None:
    """The file holds exactly these tensors: names, dtypes, shapes and every bit."""
    loaded = load_file(got)
    assert sorted(loaded) == sorted(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert raw(loaded[name]) == raw(tensor), name
