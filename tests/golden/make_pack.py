"""Makes the golden pack beside this file: `python tests/golden/make_pack.py`.

Inputs come from integer arithmetic, expected results from tests/support/readers/pack_reader.py, which shares no code with peru. Only the
pack comes from `peru shuffle-pack`. Run it again only if the format is given up."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "pack"
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402

from tests.golden.make import BITS, Tensors, from_bf16, steps, to_bf16, weights, write_model, write_safetensors  # noqa: E402
from tests.support.readers.pack_reader import PackReader  # noqa: E402

OPTIONS = ["--seed", "3", "--scale", "0.5", "--base-id", "example/base@0123abc"]
PACKS: dict[str, list[str]] = {"pack": [], "residual": ["--residual", "10%"]}  # the second one has an index of version 2
SHAPES = {"embed.weight": (20, 6), "norm": (6,), "empty": (0, 2)} | {
    f"layer.{i}.{k}": s for i in range(4) for k, s in (("w", (6, 5)), ("v", (3, 2, 6)))
}


def base() -> Tensors:
    """F32 and BF16; integers."""
    tensors: Tensors = {"ids": ("I64", np.arange(5, dtype=np.int64))}
    for seed, (name, shape) in enumerate(SHAPES.items(), 60):
        array = weights(shape, seed, bits=14)
        tensors[name] = ("BF16", to_bf16(array)) if name.endswith("v") else ("F32", array)
    return tensors


def fine_tune(number: int) -> Tensors:
    """BF16 if the base is, behind a prefix, with a head; `norm` is BF16 over an F32 base."""
    tensors: Tensors = {"enc.ids": ("I64", np.arange(5, dtype=np.int64)), "head": ("F32", weights((3, 6), 90 + number))}
    for seed, (name, (dtype, array)) in enumerate(base().items(), 100 * number + 200):
        if name == "ids":
            continue
        floats = from_bf16(array) if dtype == "BF16" else array
        moved = floats + steps(SHAPES[name], seed)
        tensors["enc." + name] = ("BF16", to_bf16(moved)) if dtype == "BF16" or name == "norm" else ("F32", moved)
    return tensors


FILES = [{"config.json": '{"task": 1}\n', "vocab.txt": "a\nb\n"}, {"config.json": '{"task": 2}\n', "vocab.txt": "a\nb\n"}]


def expected(pack: str, task: str) -> str:
    """The file with the expected result for a task of a golden pack."""
    return task if pack == "pack" else f"{pack}-{task}"


def as_read(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (d, a.shape, a.astype(a.dtype.newbyteorder("<")).tobytes()) for n, (d, a) in tensors.items()}


def write_family(folder: Path) -> list[str]:
    """Base and fine-tunes; the command line that packs them."""
    write_model(folder / "base", base(), {"generation_config.json": "{}\n"})
    for number, task in enumerate("ab"):
        write_model(folder / task, fine_tune(number), FILES[number] | {"generation_config.json": "{}\n"})
    return ["shuffle-pack", f"b={folder}/b", f"a={folder}/a", "-b", f"{folder}/base", *OPTIONS]


def main() -> None:
    """Replace every golden file of the pack."""
    if HERE.exists():
        shutil.rmtree(HERE)
    HERE.mkdir()
    write_model(HERE / "base", base(), {"generation_config.json": "{}\n"})
    kinds = {16: np.uint16, 32: np.float32, 64: np.int64}
    for pack, more in PACKS.items():
        with tempfile.TemporaryDirectory() as scratch:
            command = [*write_family(Path(scratch)), *more]
            subprocess.run([sys.executable, "-m", "peru_cli", *command, "-o", HERE / f"{pack}.safetensors"], check=True)
        reader = PackReader((HERE / f"{pack}.safetensors").read_bytes())
        for task in "ab":
            found = reader.retrieve(task, as_read(base()))
            tensors = {n: (d, np.frombuffer(raw, kinds[BITS[d]]).reshape(s)) for n, (d, s, raw) in found.items()}
            write_safetensors(HERE / f"{expected(pack, task)}.safetensors", tensors)


if __name__ == "__main__":
    main()
