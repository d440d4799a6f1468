"""Makes the golden masks beside this file: `python tests/golden/make_masks.py`.

The family is that of make_pack.py, with a third task. Expected results come from tests/support/readers/pack_reader.py, which shares
no code with peru; only the artifact comes from `peru shuffle-pack`. Run it again only if the format is given up."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "masks"
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402

from tests.golden.make import BITS, write_model, write_safetensors  # noqa: E402
from tests.golden.make_pack import FILES, as_read, base, fine_tune  # noqa: E402
from tests.support.readers.pack_reader import MaskReader  # noqa: E402

OPTIONS = ["--method", "tall-masks", "--threshold", "a=0.25", "--scale", "0.75", "--base-id", "example/base@0123abc"]


def write_family(folder: Path) -> list[str]:
    """Base and fine-tunes; the command line that masks them."""
    write_model(folder / "base", base(), {"generation_config.json": "{}\n"})
    for number, task in enumerate("abc"):
        files = {"config.json": f'{{"task": {number + 1}}}\n', "vocab.txt": FILES[0]["vocab.txt"], "generation_config.json": "{}\n"}
        write_model(folder / task, fine_tune(number), files)
    return ["shuffle-pack", *(f"{task}={folder}/{task}" for task in "bca"), "-b", f"{folder}/base", *OPTIONS]


def main() -> None:
    """Replace every golden file of the masks."""
    if HERE.exists():
        shutil.rmtree(HERE)
    HERE.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        command = write_family(Path(scratch))
        subprocess.run([sys.executable, "-m", "peru_cli", *command, "-o", HERE / "masks.safetensors"], check=True)
    write_model(HERE / "base", base(), {"generation_config.json": "{}\n"})
    reader = MaskReader((HERE / "masks.safetensors").read_bytes())
    kinds = {16: np.uint16, 32: np.float32, 64: np.int64}
    for task in "abc":
        found = reader.retrieve(task, as_read(base()))
        write_safetensors(
            HERE / f"{task}.safetensors", {n: (d, np.frombuffer(raw, kinds[BITS[d]]).reshape(s)) for n, (d, s, raw) in found.items()}
        )


if __name__ == "__main__":
    main()
