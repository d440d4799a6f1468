"""Measure prune and unpack: time, memory and size, as ratios taken in one run.

    python benchmarks/models/make_pair.py /tmp/pair11 --layers 22
    python benchmarks/models/make_pair.py /tmp/pair03 --layers 4
    python benchmarks/speed/foundation.py --large /tmp/pair11 --small /tmp/pair03 [--minilm CACHE] [--runs 3]

Every command is a process of its own; times are medians of wall seconds, memory the largest resident set.
The files are read once beforehand, so that the page cache is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PERU = [sys.executable, "-m", "peru_cli"]

OBVIOUS = """
import sys, torch
from safetensors.torch import load_file, save_file
base, fine = load_file(sys.argv[1]), load_file(sys.argv[2])
names = sorted(fine)
delta = torch.cat([(fine[n].float() - base[n].float()).view(-1) for n in names])
k = int(0.1 * delta.numel())
threshold = delta.abs().kthvalue(delta.numel() - k + 1).values
positions = torch.nonzero(delta.abs() >= threshold).view(-1)[:k]
save_file({"positions": positions.to(torch.int32), "values": delta[positions].to(torch.bfloat16)}, sys.argv[3])
"""

READ = "import sys\nfor p in sys.argv[1:]:\n    f = open(p, 'rb', buffering=0)\n    b = bytearray(1 << 20)\n    while f.readinto(b): pass"


def measure(command: list[str], clear: Path | None = None) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command. Fails loudly if it fails.

    `clear` is its output, which is removed some time before: a file that is overwritten reuses memory that a new one must allocate."""
    if clear is not None:
        clear.unlink(missing_ok=True)
        time.sleep(2)
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        message = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{message}")
    return seconds, usage.ru_maxrss * 1024


def median(command: list[str], runs: int, clear: Path | None = None) -> tuple[float, int]:
    """Median seconds and largest memory of several runs."""
    results = [measure(command, clear) for _ in range(runs)]
    return statistics.median(s for s, _ in results), max(m for _, m in results)


def prune(pair: Path, out: Path, *options: str) -> list[str]:
    """The prune command of a pair."""
    fine, base = pair / "fine1.safetensors", pair / "base.safetensors"
    return [*PERU, "prune", str(fine), "-b", str(base), "-o", str(out), "-q", "--force", "--no-sync", *options]


def inspected(artifact: Path) -> dict[str, object]:
    """The output of `peru inspect --json`."""
    return dict(json.loads(subprocess.run([*PERU, "inspect", str(artifact), "--json"], capture_output=True, check=True).stdout))


def sizes(name: str, command_for: object, out: Path) -> None:
    """Print size against the entropy bound at three densities."""
    for density in ("1%", "5%", "10%"):
        measure(command_for(out, "--keep", density))  # type: ignore[operator]
        report = inspected(out)
        print(
            f"{name} --keep {density}: {report['file_bytes']:,} bytes, {report['bits_per_parameter']:.4f} bits/param, "
            f"{report['delta_ratio']:.4f} x bound in all, {report['stream_ratio']:.4f} x streams alone"
        )


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--pair", action="append", default=[], metavar="NAME=BASE,FINE", help="further pairs whose sizes to print")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out, restored, plain = (Path(scratch) / name for name in ("a.safetensors", "r.safetensors", "o.safetensors"))
        peaks = {}
        for label, pair in (("large", arguments.large), ("small", arguments.small)):
            files = [str(pair / "base.safetensors"), str(pair / "fine1.safetensors")]
            measure([sys.executable, "-c", READ, *files])
            measure(prune(pair, out, "--keep", "10%"))
            n = int(str(inspected(out)["entries"]))
            seconds, peak = median(prune(pair, out, "--keep", "10%"), arguments.runs)
            peaks[label] = peak
            print(f"{label}, {n / 1e9:.2f}B: prune --keep 10% {seconds:.2f} s = {seconds / n * 1e9:.2f} ns/param, {peak / 1e6:.0f} MB")
            floor, _ = median([sys.executable, "-c", READ, *files], arguments.runs)
            print(f"{label}: reading both files once {floor:.2f} s; prune is {seconds / floor:.2f} x that")
            lossless, _ = median(prune(pair, restored, "--lossless"), 1)
            print(f"{label}: prune --lossless {lossless:.2f} s = {lossless / n * 1e9:.2f} ns/param")
            unpack = [*PERU, "unpack", str(out), "-b", files[0], "-o", str(restored), "-q", "--force", "--no-sync"]
            seconds, peak = median(unpack, arguments.runs, restored)
            copied, _ = median(["cp", files[1], str(restored)], arguments.runs, restored)
            read, _ = median([sys.executable, "-c", READ, files[0]], arguments.runs)
            floor = copied + read
            print(f"{label}: unpack {seconds:.2f} s, {peak / 1e6:.0f} MB; {seconds / floor:.2f} x (cp of the output + reading the base)")
            restored.unlink()
        print(f"peak memory large / small: {peaks['large'] / peaks['small']:.3f}")
        files = [str(arguments.small / "base.safetensors"), str(arguments.small / "fine1.safetensors")]
        ours, _ = median(prune(arguments.small, out, "--keep", "10%"), arguments.runs)
        script, memory = median([sys.executable, "-c", OBVIOUS, *files, str(plain)], arguments.runs)
        print(f"small: the obvious script {script:.2f} s, {memory / 1e6:.0f} MB; {script / ours:.1f} x as long as prune ({ours:.2f} s)")
        sizes("large", lambda o, *options: prune(arguments.large, o, *options), out)
        for text in arguments.pair:
            name, files_text = text.split("=")
            base, fine = files_text.split(",")
            sizes(name, lambda o, *options, b=base, f=fine: [*PERU, "prune", f, "-b", b, "-o", str(o), "-q", "--force", *options], out)


if __name__ == "__main__":
    main()
