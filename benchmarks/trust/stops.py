"""Commands that are killed, interrupted, or run on a full disk: the old state or the new one, and the same bytes next time."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections import Counter
from types import SimpleNamespace
from typing import Any

from cases import BIG, MIDDLING, PARTLY, SMALL, SMALLER, Case, cases, visible
from running import Run

_PACKS = {  # these read all models several times
    "shuffle-pack pack.safetensors", "shuffle-pack masks.safetensors", "shuffle-pack magnitude-masks", "shuffle-pack emr",
    "shuffle-pack --add-to", "unpack a pack", "unpack masks", "chain squash", "chain squash to a file", "chain prune",
}  # fmt: skip
_SINGULAR = {  # these compute singular values
    "prune mixed.safetensors", "prune low-rank", "merge tsv-m", "svd-lora adapter", "svd-lora with a delta", "svd-lora smaller",
    "shuffle-pack smile", "unpack mixed", "unpack an adapter",
}  # fmt: skip
_GOES_ON = ("as before", "partly done, no step lost")  # the same command may be killed again
_LONG = {"demo": 10, "prune mixed.safetensors": 2, "prune low-rank": 2}  # seconds even when small: a tenth or half of the moments


def kills(record: Any, each: int) -> None:
    """Kill every command `each` times, at moments spread over its run time. Check the state, run it again.

    Models have 200 MB, for slow commands 20 MB or 4 MB."""

    def size_of(name: str) -> tuple[int, int, int]:
        return SMALL if name in _SINGULAR or name == "demo" else SMALLER if name in _PACKS else BIG

    for size, said in ((BIG, "200 MB"), (SMALLER, "20 MB"), (SMALL, "4 MB")):
        with cases(size, lambda name, size=size: size_of(name) == size) as found:  # type: ignore[misc]
            for case in found:
                key = f"kills: {case.name}, {said}: 0"
                if key not in record.counts:
                    case.measure()
                    record.add(key, _killed(case, each))
                    case.empty()


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
        elif number % 3 == 2 or number == each - 1 or state not in _GOES_ON:
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
            case.empty()


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


def rivals(record: Any, each: int) -> None:
    """Start every command twice, the second time while the first is at work: one output, whole, and nothing else."""
    with cases(MIDDLING) as found:
        for case in found:
            key = f"rivals: {case.name}: 0"
            if key in record.counts or case.name == "demo":  # it needs an empty folder
                continue
            case.measure()
            counts = Counter[str]()
            for number in range(each):
                case.clear()
                first = case.start()
                code = first.wait(case.seconds * number / each)
                second = case.start(said="rival")
                codes = (first.wait() if code is None else code, second.wait())
                counts[_raced(case, codes, (first.said, second.said))] += 1
            if case.inputs_changed():
                counts["INPUTS CHANGED"] += 1
            record.add(key, dict(counts))
            case.empty()


def _raced(case: Case, codes: tuple[int | None, int | None], said: tuple[str, str]) -> str:
    """The result of two commands with one output."""
    if case.state() != "complete" or case.others() or 0 not in codes:
        return f"EXIT {codes}, {case.state().upper()}, {case.others()}, {said[0][-150:].upper()}, {said[1][-150:].upper()}"
    if codes == (0, 0):
        return "both done, one output"
    lost = said[0 if codes[0] else 1]
    refused = (
        "is being written by another peru",
        "exists already",
        "already: ",
        "changed by somebody else",
        "disappeared while",
        "was changed",
    )
    return (
        "one done, one refused"
        if any(words in lost for words in refused) and "Traceback" not in lost
        else f"EXIT {codes}, {lost[-250:].upper()}"
    )


def disks(record: Any, _: int) -> None:
    """Run every command on a disk that fills up at a tenth, a half or nine tenths of its output; the check for space is off."""
    from peru_cli.checkpoints.local import atomic

    class Endless:
        free = 1 << 60

    atomic.shutil = SimpleNamespace(**{**vars(shutil), "disk_usage": lambda _: Endless})  # type: ignore[attr-defined]
    with cases(MIDDLING) as found:
        for case in found:
            key = f"disks: {case.name}: 0"
            if key in record.counts:
                continue
            case.measure()
            if (size := _written(case)) == 0:
                continue  # it writes only on the Hub
            kept = sum(-(-file.stat().st_size // 4096) * 4096 for file in visible(case.begin)) if case.begin is not None else 0
            counts = Counter[str]()
            for share in (0.1, 0.3, 0.5, 0.7, 0.9):
                room = max(4096, int(kept + size * share) // 4096 * 4096)
                options = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(case.place)]
                case.empty()
                if subprocess.run(options, capture_output=True).returncode:
                    print("no small file system can be mounted here")
                    return
                try:
                    counts[_filled(case)] += 1
                finally:
                    subprocess.run(["umount", str(case.place)], check=True)
            if case.inputs_changed():
                counts["INPUTS CHANGED"] += 1
            record.add(key, dict(counts))
            case.empty()


def _written(case: Case) -> int:
    """Bytes of the files that the command has written."""
    old = {path.relative_to(case.begin): path.read_bytes() for path in visible(case.begin)} if case.begin is not None else {}
    new = {path.relative_to(case.target): path.read_bytes() for path in visible(case.target)} if case.target.exists() else {}
    return sum(len(data) for name, data in new.items() if old.get(name) != data)


def _filled(case: Case) -> str:
    """The result of one full disk."""
    case.prepare()
    run = case.start()
    code, state = run.wait(), case.state()
    if code != 1:
        return f"EXIT {code}, {state.upper()}" if (code, state) != (0, "complete") else "room enough"
    if state not in (*_GOES_ON, PARTLY) or case.others():
        return f"{state.upper()}, LEFT {case.others()}"
    if "the disk is full" not in run.said or "Traceback" in run.said:
        return run.said[-200:].upper()
    return "refused, nothing left" if state == "as before" else f"refused, {state}"
