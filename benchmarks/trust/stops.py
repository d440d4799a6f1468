"""Commands that are killed, interrupted, or run on a full disk: the old state or the new one, and the same bytes next time."""

from __future__ import annotations

import random
import signal
import subprocess
from collections import Counter
from typing import Any

from cases import BIG, MIDDLING, SMALL, SMALLER, Case, cases
from running import Run

_PACKS = {  # these read all models several times
    "shuffle-pack pack.safetensors", "shuffle-pack masks.safetensors", "shuffle-pack magnitude-masks", "shuffle-pack --add-to",
    "unpack a pack", "unpack masks",
}  # fmt: skip
_SINGULAR = {  # these compute singular values
    "prune mixed.safetensors", "prune low-rank", "merge tsv-m", "svd-lora adapter", "svd-lora with a delta", "svd-lora smaller",
    "unpack mixed", "unpack an adapter",
}  # fmt: skip
_LONG = {"demo": 10, "prune mixed.safetensors": 2, "prune low-rank": 2}  # seconds even when small: a tenth or half of the moments


def kills(record: Any, each: int) -> None:
    """Kill every command `each` times, at moments spread over its run time. Check the state, run it again.

    Models have 200 MB, for slow commands 20 MB or 4 MB."""

    def size_of(name: str) -> tuple[int, int, int]:
        return SMALL if name in _SINGULAR else SMALLER if name in _PACKS else BIG

    for size, said in ((BIG, "200 MB"), (SMALLER, "20 MB"), (SMALL, "4 MB")):
        with cases(size, lambda name, size=size: size_of(name) == size) as found:  # type: ignore[misc]
            for case in found:
                key = f"kills: {case.name}, {said}: 0"
                if key not in record.counts:
                    case.measure()
                    record.add(key, _killed(case, each))
                    case.clear()


def _killed(case: Case, each: int) -> dict[str, int]:
    """Results of the kills of one command."""
    counts, noise = Counter[str](), random.Random(case.name)
    for number in range(each):
        if number % 3 == 0:  # the next two runs are killed while they continue from what was left
            case.clear()
        run = case.start()
        code = run.wait(case.seconds * (number + noise.random()) / each)
        if code is None:
            run.send(signal.SIGKILL)
            code = run.wait()
        state = case.state()
        if code not in (0, -signal.SIGKILL):
            counts[f"EXIT {code}, {run.said[-200:].upper()}"] += 1
        counts[{"as before": "killed, nothing in place", "complete": "complete"}.get(state, state)] += 1
        if state == "complete":
            case.clear()
        elif number % 3 == 2 or number == each - 1:
            counts[case.finishes()] += 1
            case.clear()
    if case.inputs_changed():
        counts["INPUTS CHANGED"] += 1
    return dict(counts)


def interrupts(record: Any, moments: int) -> None:
    """Press Ctrl-C at this many moments of each command."""
    with cases(MIDDLING, reading=True) as found:
        for case in found:
            key = f"interrupts: {case.name}: 0"
            if key in record.counts:
                continue
            case.measure()
            counts = Counter[str]()
            often = -(-moments // _LONG.get(case.name, 1))
            for number in range(often):
                case.clear()
                run = case.start()
                code = run.wait(case.seconds * (number + 0.5) / often)
                if code is None:
                    run.send(signal.SIGINT)
                    code = run.wait()
                counts[_interrupted(case, run, code)] += 1
                if case.reference is not None and case.state() != "complete" and (number % 5 == 0 or case.others()):
                    counts[case.finishes()] += 1
            if case.inputs_changed():
                counts["INPUTS CHANGED"] += 1
            record.add(key, dict(counts))
            case.clear()


def _interrupted(case: Case, run: Run, code: int | None) -> str:
    """The result of one Ctrl-C."""
    state, left = case.state(), case.others()
    if code == 0 and state == "complete":
        return "done before"
    if code != 130 or "Traceback" in run.said or "interrupted" not in run.said:
        return f"EXIT {code}, {run.said[-200:].upper()}"
    if left and "the same command again" not in run.said:
        return f"LEFT {left} WITHOUT A WORD"
    if case.reference is None:
        return state if left else "130, as before"
    return {"complete": "130, complete", "as before": "130, to go on with" if left else "130, as before"}.get(state, state)


def disks(record: Any, _: int) -> None:
    """Run every command on a disk that fills up at a tenth, a half or nine tenths of its output; the check for space is off."""
    from peru_cli.checkpoints.local import atomic, writer

    def unchecked(*given: object, **named: object) -> None:
        pass

    atomic.check_room = writer.check_room = unchecked
    with cases(MIDDLING) as found:
        for case in found:
            key = f"disks: {case.name}: 0"
            if key in record.counts:
                continue
            run = case.start()
            assert run.wait() == 0, run.said
            size = sum(file.stat().st_size for file in [case.target, *case.target.rglob("*")] if file.is_file())
            case.clear()
            counts = Counter[str]()
            for share in (0.1, 0.3, 0.5, 0.7, 0.9):
                options = ["mount", "-t", "tmpfs", "-o", f"size={max(4096, int(size * share) // 4096 * 4096)}", "tmpfs", str(case.place)]
                if subprocess.run(options, capture_output=True).returncode:
                    print("no small file system can be mounted here")
                    return
                try:
                    counts[_filled(case)] += 1
                finally:
                    subprocess.run(["umount", str(case.place)], check=True)
            record.add(key, dict(counts))


def _filled(case: Case) -> str:
    """The result of one full disk."""
    case.place.joinpath("old").write_bytes(b"")
    run = case.start()
    code = run.wait()
    left = [path.name for path in case.place.iterdir() if path.name != "old"]
    if code != 1:
        return f"EXIT {code}, LEFT {left}"
    if left:
        return f"LEFT {left}"
    return "refused, nothing left" if "the disk is full" in run.said and "Traceback" not in run.said else run.said[-200:].upper()
