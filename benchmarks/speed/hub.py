"""`peru prune --stream` from a loopback Hub against curl fetching the same ranges: time, peak memory, files written.

    python benchmarks/speed/hub.py [--gigabytes 1]

The server is tests/support/hub_server.py in its own process. curl fetches the ranges that peru requested, in the same order, with
the same concurrency, and discards them. Both run in turn, three times, and so does the same prune from files. The ratio of medians
counts, since the machine's other load is in all. Processor seconds show a command's cost without that load. curl needs few of
them: on few processors the computing takes the time, not the fetching."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from peru_cli.checkpoints.dtypes import BY_NAME  # noqa: E402
from peru_cli.checkpoints.header import TensorInfo, build_header  # noqa: E402
from peru_cli.checkpoints.local.readahead import CONNECTIONS  # noqa: E402

SERVE = """
import json, sys
from pathlib import Path
from tests.support.hub_server import HubServer
with HubServer() as hub:
    hub.add("meta/base", Path(sys.argv[1])); hub.add("org/fine", Path(sys.argv[2]))
    print(hub.url, flush=True)
    for line in sys.stdin:
        ranges = [(hub.cdn + r.path, *r.range) for r in hub.requests if r.status == 206 and r.range and r.origin == "cdn"]
        print(json.dumps(ranges), flush=True)
        hub.clear()
"""


def write_pair(folder: Path, nbytes: int) -> None:
    """A bf16 base and a fine-tune in one file each, 64 MB a tensor."""
    noise = np.random.default_rng(0)
    rows = 1 << 25
    infos = [TensorInfo(f"layers.{i}.weight", BY_NAME["BF16"], (rows,), 2 * rows * i) for i in range(max(nbytes // (2 * rows), 1))]
    header = build_header(infos, {})
    for name in ("base", "fine"):
        (folder / name).mkdir()
    with (folder / "base/model.safetensors").open("wb") as base, (folder / "fine/model.safetensors").open("wb") as fine:
        base.write(header)
        fine.write(header)
        for _ in infos:
            weights = (noise.standard_normal(rows, np.float32) * 0.02).view(np.uint32) >> 16
            base.write(weights.astype(np.uint16).tobytes())
            changed = noise.random(rows, np.float32) < 0.5
            fine.write((weights + changed * noise.integers(0, 4, rows, np.uint32)).astype(np.uint16).tobytes())


def peak_of(command: list[str], env: dict[str, str]) -> tuple[float, int, float]:
    """Seconds, peak resident bytes and processor seconds of a command."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process, peak = subprocess.Popen(command, env=env), 0
    while process.poll() is None:  # wait4 would include this process's memory
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, peak * 1024, spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of each model")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, int(options.gigabytes * 1e9))
        serve = [sys.executable, "-c", SERVE, str(folder / "base"), str(folder / "fine")]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().strip()
        env |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        out = folder / "a.safetensors"
        prune = [sys.executable, "-m", "peru_cli", "prune", "org/fine", "-b", "meta/base", "-o", str(out), "--keep", "5%", "--stream"]
        files = [
            sys.executable,
            "-m",
            "peru_cli",
            "prune",
            str(folder / "fine"),
            "-b",
            str(folder / "base"),
            "-o",
            str(out),
            "--keep",
            "5%",
        ]
        ours, curls, locals_, peaks, nbytes, spent = [], [], [], [], 0, [0.0, 0.0, 0.0]
        for _ in range(options.rounds):
            seconds, peak, spent[0] = peak_of([*prune, "--force", "--quiet", "--no-sync"], env)
            ours.append(seconds)
            peaks.append(peak)
            server.stdin.write("\n")
            server.stdin.flush()
            ranges = json.loads(server.stdout.readline())
            nbytes = sum(last - first + 1 for _, first, last in ranges)
            config = folder / "curl"
            config.write_text(
                "\nnext\n".join(f'url = "{u}"\nrange = "{first}-{last}"\noutput = "/dev/null"\nsilent\nfail' for u, first, last in ranges)
            )
            curl = ["curl", "--parallel", "--parallel-max", str(2 * CONNECTIONS), "--noproxy", "*", "--config", str(config), "--silent"]
            seconds, _, spent[1] = peak_of(curl, env)
            curls.append(seconds)
            server.stdin.write("\n")
            server.stdin.flush()
            server.stdout.readline()
            seconds, _, spent[2] = peak_of([*files, "--force", "--quiet", "--no-sync"], env)
            locals_.append(seconds)
        server.kill()
        written = [path for path in (folder / "hf").rglob("*") if path.is_file()]
        mine, theirs = statistics.median(ours), statistics.median(curls)
        print(f"{nbytes / 1e9:.2f} GB in {len(ranges)} ranges, {len(written)} files written besides the output")
        rates = [f"{seconds:.2f} s ({nbytes / seconds / 1e6:.0f} MB/s)" for seconds in (mine, theirs)]
        print(f"peru {rates[0]}, curl {rates[1]}: {theirs / mine:.0%}")
        print(f"from files {statistics.median(locals_):.2f} s: by ranges in {mine / statistics.median(locals_):.2f} times that")
        print("processor seconds: peru {:.1f}, curl {:.1f}, from files {:.1f}".format(*spent))
        print(f"peak memory {max(peaks) / 1e6:.0f} MB; rounds {[round(s, 2) for s in ours]}, curl {[round(s, 2) for s in curls]}")


if __name__ == "__main__":
    main()
