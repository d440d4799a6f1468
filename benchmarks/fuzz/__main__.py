"""Made-up inputs against every command that reads weights: right values, or a message that names the file; never a traceback.

    python benchmarks/fuzz --cases 10000 --seed 0

A case is a family of checkpoints (families.py, quantised.py) or an adapter (adapters.py) in files as they are on the Hub, and one
command with its inverse (commands.py). The right result is computed in plain torch from the tensors before they were written
(right.py). All cases run in this process, about 30 a second. Failures are printed with their seed: `--seed SEED --cases 1`."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from commands import one
from right import Wrong


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count: Counter[str] = Counter()
    wrong, began = 0, time.process_time()
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        folder = Path(tempfile.mkdtemp(prefix="peru-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        about: object = ""
        try:
            run, about = one(random.Random(seed), folder, count)
            run()
        except Exception as error:
            wrong += 1
            print(f"seed {seed} {about}: {error if isinstance(error, Wrong) else traceback.format_exc()}\n", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.process_time() - began
    print(
        f"{arguments.cases} cases in {seconds:.0f} s, {wrong} wrong\n" + "\n".join(f"  {n:6} {name}" for name, n in sorted(count.items()))
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
