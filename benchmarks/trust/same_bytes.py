"""Do two checkouts write the same bytes? Runs every writing command with both on the demo family, and rebuilds the golden artifacts.

    python benchmarks/trust/same_bytes.py OLD_CHECKOUT [--work DIR] [--only REGEX]

Both trees read this checkout's demo family. All files are compared byte for byte, and so are exit codes. Merges, heads and
adapters carry digests in their metadata since version 1 of sealed files (docs/format.md): where one side has none, tensors and
the rest of the metadata are compared, and the line says so. Model cards (README.md) are prose and are not compared.
Exits with 1 if anything else differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAMILY = ROOT / "peru_cli" / "demo" / "data"
TASKS = ("digits", "fashion_mnist", "notmnist")
DIGESTS = ("peru.sealed", "peru.digests", "peru.files")
MERGES = (
    "task-arithmetic", "linear", "slerp", "ties", "dare", "dare-ties", "breadcrumbs", "consensus", "fisher", "regmean", "adamerging",
)  # fmt: skip
WITH_DATA = ("fisher", "regmean", "adamerging")
OWN = "--per-task classifier"
EXPECTED = {  # what CHANGELOG.md says changed
    "merge-breadcrumbs/model.safetensors": "keeps exactly floor(keep n) entries now",
    "lora-bytes/": "digests take part of the same --max-bytes, so that ranks differ",
}


def commands() -> Iterator[tuple[str, str]]:
    """A name and a command line each; in order, as later ones read what earlier ones wrote."""
    every = " ".join(TASKS)
    yield "prune", "prune digits --base base -o prune.safetensors --keep 5%"
    yield "prune several", f"prune {every} --base base -o several/ --keep 10% --scope tensor"
    yield "prune lossless", "prune digits --base base -o lossless.safetensors --lossless"
    yield "prune bf16", "prune digits --base base -o bf16.safetensors --keep 5% --values bf16 --per-task classifier"
    yield "prune exact", "prune digits --base base -o exact.safetensors --keep 5% --values exact"
    yield "prune bytes", "prune digits --base base -o mixed.safetensors --max-bytes 200kB"
    yield "prune bits", f"prune {every} --base base -o bits/ --bits 0.7"
    for method in MERGES:
        models = " ".join(TASKS[:2]) if method == "slerp" else every
        data = " ".join(f"--data {t}=data/{t}.npz" for t in TASKS) + " --max-samples 20 --stats stats" if method in WITH_DATA else ""
        more = "--steps 2 --batch-size 10" if method == "adamerging" else ""
        yield f"merge {method}", f"merge {models} --base base -o merge-{method}/ -m {method} {OWN} {data} {more}"
    yield "merge a file", "merge merge-ties merge-dare --base base -o merged.safetensors -m ties --keep 20%"
    yield "merge bf16", f"merge {every} --base base -o merged-bf16/ -m task-arithmetic --dtype bf16 {OWN}"
    yield "merge weighted", f"merge {every} -o linear/ -m linear -w digits=2 -w notmnist=0.5 {OWN}"
    yield "merge compressed", f"merge {every} --base base -o fft/ -m task-arithmetic --scale 0.3 {OWN} --compress 5%"
    pack = f"shuffle-pack {every} --base base {OWN}"
    yield "pack", f"{pack} -o pack.safetensors --seed 3"
    yield "pack residual", f"{pack} -o residual.safetensors --residual 1%"
    yield "pack shift", f"{pack} -o shift.safetensors --decorrelate shift --no-signs --precision 8 --scale auto"
    yield "pack PSP", f"{pack} -o psp.safetensors --whole-weights"
    yield "pack merge-base", f"{pack} -o on-base.safetensors --merge-base new-base/"
    yield "pack TALL", f"{pack} -o tall.safetensors --method tall-masks"
    yield "pack magnitude", f"{pack} -o magnitude.safetensors --method magnitude-masks --keep 20%"
    yield "pack add", "shuffle-pack sign_digits --add-to pack.safetensors --base base -o added.safetensors"
    yield "pack remove", "shuffle-pack digits --remove-from added.safetensors --base base -o removed.safetensors"
    yield "lora", "svd-lora digits --base base -o lora/ --rank 8"
    yield "lora energy", "svd-lora digits --base base -o lora-energy/ --energy 60% --rest delta"
    yield "lora bytes", "svd-lora digits --base base -o lora-bytes/ --max-bytes 300kB"
    yield "lora smaller", "svd-lora lora -o lora-smaller/ --rank 3"
    for artifact in ("prune", "lossless", "bf16", "exact", "mixed"):
        yield f"unpack {artifact}", f"unpack {artifact}.safetensors --base base -o un-{artifact}/"
    for packed in ("pack", "residual", "shift", "psp", "tall", "magnitude", "added", "removed"):
        yield f"unpack {packed}", f"unpack {packed}.safetensors --task notmnist --base base -o un-{packed}.safetensors"
    yield "unpack merge-base", "unpack on-base.safetensors --task digits --base new-base -o un-on-base.safetensors"
    yield "unpack fp16", "unpack prune.safetensors --base base -o un-fp16.safetensors --dtype fp16"
    yield "unpack fft", "unpack fft/digits.safetensors --base fft/merged -o un-fft/"
    yield "unpack a head", "unpack merge-ties --task digits -o un-head/"
    for adapter in ("lora", "lora-energy", "lora-smaller"):
        yield f"unpack {adapter}", f"unpack {adapter} --base base -o un-{adapter}/"
    for name in ("tiny", "lossless", "grown", "heads"):
        yield f"golden {name}", f"unpack golden/{name}/artifact.safetensors --base golden/{name}/base -o golden-{name}.safetensors"
    for kind in ("pack", "masks"):
        for name in ("a", "b"):
            golden = f"golden/{kind}/{kind}.safetensors --base golden/{kind}/base"
            yield f"golden {kind} {name}", f"unpack {golden} --task {name} -o {kind}-{name}.safetensors"


def work_in(folder: Path, lines: list[tuple[str, str]]) -> None:
    """Run the commands in this process, in a folder, with the peru that PYTHONPATH names; exit codes go to codes.json."""
    os.chdir(folder)
    from peru_cli import cli
    from peru_cli.console import console

    codes, seconds = {}, {}
    for name, line in lines:
        console.quiet = console.json = False
        before = os.times()
        codes[name] = cli.run([*line.split(), "--no-sync", "--quiet"])
        after = os.times()
        seconds[name] = after.user - before.user + after.system - before.system
        Path("codes.json").write_text(json.dumps([codes, seconds]))


def run(checkout: Path, folder: Path, golden: Path, only: str) -> tuple[dict[str, int], dict[str, float]]:
    """Exit code and CPU seconds of every command with a checkout."""
    folder.mkdir(parents=True)
    (folder / "base").symlink_to(FAMILY / "base")
    (folder / "data").symlink_to(FAMILY / "images")
    (folder / "golden").symlink_to(golden)
    for task in (*TASKS, "sign_digits"):
        (folder / task).symlink_to(FAMILY / "fine-tunes" / task)
    with (folder / "log.txt").open("w") as log:
        call = [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder), "--only", only, str(checkout)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(call, check=True, env=environment, stdout=log, stderr=log)
    codes, seconds = json.loads((folder / "codes.json").read_text())
    return codes, seconds


def outputs(folder: Path) -> dict[str, Path]:
    """All files that commands wrote, by their names below the folder."""
    given = {"base", "data", "golden", "log.txt", "codes.json", *TASKS, "sign_digits"}
    files = (path for top in sorted(folder.iterdir()) if top.name not in given for path in ([top] if top.is_file() else top.rglob("*")))
    return {str(path.relative_to(folder)): path for path in files if path.is_file()}


def _parts(path: Path) -> tuple[dict[str, str], dict[str, Any], bytes]:
    """Metadata without digests, tensors and bytes of a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = {key: value for key, value in header.pop("__metadata__", {}).items() if key not in DIGESTS}
    return metadata, header, raw[8 + size :]


def difference(old: Path, new: Path) -> str:
    """What differs between two files: nothing (""), digests, or else."""
    if old.read_bytes() == new.read_bytes():
        return ""
    if old.suffix == ".safetensors":
        (told, had, was), (tells, has, is_now) = _parts(old), _parts(new)
        if had == has and was == is_now:
            changed = sorted(key for key in told.keys() | tells.keys() if told.get(key) != tells.get(key))
            return "digests" if not changed else f"digests; metadata {', '.join(changed)}"
        return "TENSORS"
    if old.suffix == ".json":
        a, b = (json.loads(path.read_text()) for path in (old, new))
        return "JSON: " + ", ".join(sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)))
    return "prose" if old.name == "README.md" else "BYTES"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--work", type=Path, help="a folder for the outputs, which are kept; default: a temporary one")
    parser.add_argument("--only", default="", help="only commands whose names match")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    lines = [(name, line) for name, line in commands() if re.search(args.only, name)]
    if args.worker is not None:
        work_in(args.worker, lines)
        return 0
    work = args.work or Path(tempfile.mkdtemp(prefix="same-bytes-"))
    sides = {"old": args.old.resolve(), "new": ROOT}
    ran = {side: run(checkout, work / side, sides["old"] / "tests" / "golden", args.only) for side, checkout in sides.items()}
    (before, old_seconds), (after, new_seconds) = ran["old"], ran["new"]
    failed = [name for name in before if after[name] != before[name] and before[name] == 0]
    print("\n".join(f"{name}: exit {before[name]} before, {after[name]} now" for name in before if after[name] != before[name]))
    print("\n".join(f"{name}: exit {code} with both" for name, code in before.items() if code and after[name] == code))
    old, new = outputs(work / "old"), outputs(work / "new")
    fine, found = 0, {name: difference(old[name], new[name]) for name in sorted(old.keys() & new.keys())}
    for name, what in found.items():
        fine += not what
        reason = next((why for start, why in EXPECTED.items() if name.startswith(start)), "")
        if what:
            print(f"{name}: {what}{f' ({reason})' if reason else ''}")
        if what.startswith(("TENSORS", "BYTES")) and not reason:
            failed.append(name)
    print(f"{fine} of {len(found)} files are the same byte for byte; only before: {sorted(old.keys() - new.keys())}")
    print(f"only now: {sorted(new.keys() - old.keys())}")
    for kind in ("prune", "merge", "pack", "lora", "unpack"):
        both = [name for name, code in before.items() if name.split()[0] == kind and code == after[name] == 0]
        sums = [sum(table[name] for name in both) for table in (old_seconds, new_seconds)]
        if sums[0]:
            print(f"{kind}: {sums[1]:.1f} s of CPU, {sums[1] / sums[0]:.2f} of before")
    if args.work is None:
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
