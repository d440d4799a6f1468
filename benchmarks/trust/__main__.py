"""A campaign of damage: alter every file of every output, kill, interrupt and race every command, fill disks; count the results.

    python benchmarks/trust --record FILE [--mutations N] [--kills N] [--moments N] [--rivals N]
        [--only mutations|kills|interrupts|rivals|disks] [--match REGEX]

The result of damage must be an error, or the bytes that the sound file gives; the result of a kill, the old state or the new one.
FILE keeps the counts, so that an interrupted campaign continues. At the end one table is printed. The exit code is 1 if it contains
anything that must not happen (in capitals, or a defect, a hang, memory that a file asked for, partial output).

On one core of a laptop 100,000 mutations take about 20 minutes. Kills take models of 200 MB in memory (1 GB in /dev/shm)."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cases
import mutate
import outputs
import running
import stops

PARTS = ("mutations", "kills", "interrupts", "rivals", "disks")


class Record:
    """The counts so far, in a file: a JSON line for each piece of work, its key and its counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.counts: dict[str, dict[str, int]] = dict(json.loads(line) for line in lines)

    def add(self, key: str, counts: dict[str, int]) -> None:
        """Record the result of one piece."""
        self.counts[key] = counts
        with open(self._path, "a") as file:
            file.write(json.dumps([key, counts]) + "\n")

    def table(self) -> tuple[list[str], bool]:
        """Lines of a Markdown table, and whether anything failed. A key is `part: what: number`."""
        rows: dict[tuple[str, str], Counter[str]] = {}
        for key, counts in self.counts.items():
            part, what, _ = key.split(": ")
            rows.setdefault((part, what), Counter()).update(counts)
        lines = ["| part | of what | times | what came out |", "| --- | --- | ---: | --- |"]
        bad = False
        for (part, what), counts in sorted(rows.items(), key=lambda row: (PARTS.index(row[0][0].split(",")[0]), row[0])):
            said = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
            lines.append(f"| {part} | {what} | {sum(counts.values()):,} | {said} |")
            bad = bad or any(name in mutate.FAILURES or name.isupper() for name in counts)
        return lines, bad


def mutations(record: Record, total: int) -> None:
    """Alter files, this many times in total."""
    with tempfile.TemporaryDirectory(prefix="peru-trust-", dir=place()) as folder:
        found = outputs.victims(Path(folder))
        wanted: dict[str, object] = {}
        mutate.bound_memory()
        for victim, forged, number in mutate.plan(found, total):
            key = f"mutations{', resealed' if forged else ''}: {victim.name}: {number}"
            if key in record.counts:
                continue
            if victim.name not in wanted:
                victim.prepare()
                code, said = outputs.peru(*victim.command)
                assert code == 0, said
                wanted[victim.name] = outputs.content(victim.result)
                outputs.clear(victim.result)
            record.add(key, mutate.batch(victim, forged, key, wanted[victim.name]))


def place() -> str | None:
    """Where to write files: in memory, if possible."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    """Run what was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="where counts are kept")
    parser.add_argument("--mutations", type=int, default=100_000, help="of all files together")
    parser.add_argument("--kills", type=int, default=8, help="of each command that writes, at models of 200 MB")
    parser.add_argument("--moments", type=int, default=50, help="at which each command is interrupted")
    parser.add_argument("--rivals", type=int, default=4, help="moments at which each command is started a second time")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--match", default="", help="kill and interrupt only commands whose names match")
    given = parser.parse_args()
    cases.MATCH = re.compile(given.match)
    outputs.environment()
    for part, work, size in zip(
        PARTS,
        (mutations, stops.kills, stops.interrupts, stops.rivals, stops.disks),
        (given.mutations, given.kills, given.moments, given.rivals, 0),
        strict=True,
    ):
        if given.only is None or part in given.only:
            running.apart(lambda work=work, size=size: work(Record(given.record), size))  # type: ignore[misc]
    lines, bad = Record(given.record).table()
    print("\n".join(lines))
    sys.exit(bad)


if __name__ == "__main__":
    main()
