"""Damage to files: bytes changed, removed and inserted, and the same with recomputed digests, as a careful forger would."""

from __future__ import annotations

import random
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from outputs import Hangs, Victim, clear, content, peru

from peru_cli.artifacts import container
from peru_cli.checkpoints.digests import TensorDigest, leaves
from peru_cli.checkpoints.header import parse_header
from peru_cli.checkpoints.local import sealed
from peru_cli.errors import PeruError
from tests.support.damage import damaged

BATCH = 250
ROOM = 8 << 30  # bytes of address space more than at the start: code that trusts a length of a terabyte exhausts them
FAILURES = ("OTHER RESULT", "NOT TOLD", "defect", "left something", "hangs", "out of memory")


def bound_memory() -> None:
    """Make requests for too much memory fail."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))


def outcome(victim: Victim, wanted: object, forged: bool) -> str:
    """What the command that reads a damaged file did."""
    victim.prepare()
    try:
        code, said = peru(*victim.command)
    except Hangs:
        return "hangs"
    found = content(victim.result)
    clear(victim.result)
    if "Traceback" in said or "a defect in peru" in said:
        return "defect"
    if "not enough memory" in said:
        return "out of memory"
    if code:
        return "left something" if found is not None else "refused"
    return "same result" if found == wanted else "forged result" if forged else "OTHER RESULT"


def told(victim: Victim, forged: bool) -> str:
    """What `peru verify` reports about a damaged file."""
    try:
        code, said = peru("verify", victim.verified)
    except Hangs:
        return "hangs"
    if "Traceback" in said or "a defect in peru" in said:
        return "defect"
    return "told by verify" if code else "forged, and sound" if forged else "NOT TOLD"


def batch(victim: Victim, forged: bool, seed: str, wanted: object) -> dict[str, int]:
    """Damage a file BATCH times. Returns how often each result occurred. Restores the file afterwards."""
    noise, found, sound = random.Random(seed), Counter[str](), victim.path.read_bytes()
    try:
        for number in range(BATCH):
            try:
                bad = resealed(sound, noise) if forged else damaged(sound, noise, noise.choice((1, 1, 1, 3)))
            except (PeruError, ValueError, KeyError, IndexError):  # damage that leaves nothing to seal
                bad = damaged(sound, noise, 1)
            victim.path.write_bytes(bad)
            changed = bad != sound
            if victim.verified is not None and number % 8 == 0 and changed:
                found[told(victim, forged)] += 1
            else:
                found[outcome(victim, wanted, forged)] += 1
    finally:
        victim.path.write_bytes(sound)
    return dict(found)


# -- forgers ------------------------------------------------------------------------------------------


def resealed(data: bytes, noise: random.Random) -> bytes:
    """A file of peru's, altered in one place, with all digests outside of streams recomputed."""
    length = 8 + int.from_bytes(data[:8], "little")
    return _artifact(data, length, noise) if b'"peru.digest"' in data[:length] else _sealed(data, length, noise)


def _artifact(data: bytes, length: int, noise: random.Random) -> bytes:
    """Damage to the index, the metadata, the sizes of roles, or their bytes; the header's digest is right."""
    header = parse_header(data[8:length], len(data))
    metadata = {key: value for key, value in header.metadata.items() if key != "peru.digest"}
    roles = {name: data[length + info.begin : length + info.begin + info.nbytes] for name, info in header.tensors.items()}
    kind = noise.randrange(10)
    if kind < 6:  # the index claims long data
        roles["index"] = _altered(roles["index"], noise)
    elif kind < 8:
        key = noise.choice(sorted(metadata))
        metadata[key] = _altered(metadata[key].encode(), noise).decode("utf-8", "replace")
    elif kind < 9:  # a byte moves from one role to the next
        first, second = [name for name in container.ROLES if name in roles][-2:]
        roles[first], roles[second] = roles[first][:-1], roles[first][-1:] + roles[second]
    else:
        name = noise.choice(sorted(roles))
        roles[name] = _altered(roles[name], noise)
    sizes = {name: len(role) for name, role in roles.items()}
    blank = container._header(sizes, {**metadata, "peru.digest": "0" * 64}, reserve=length)
    digest = container._seal(blank, roles["index"])
    whole = container._header(sizes, {**metadata, "peru.digest": digest}, reserve=length)
    return whole + b"".join(roles[name] for name in container.ROLES if name in roles)


def _altered(data: bytes, noise: random.Random) -> bytes:
    """Bytes changed in place, mostly to values that make numbers long; or inserted, or removed."""
    changed = bytearray(data)
    at = noise.randrange(max(1, len(changed)))
    kind = noise.randrange(6)
    if kind < 2:
        changed[at : at + 1] = bytes([noise.randrange(256)])
    elif kind < 4:
        run = noise.choice((b"\xff" * 8 + b"\x01", b"\xff\xff\xff\xff\x07", b"\x80\x80\x80\x80\x10", b"\0", b"\x7f", b"9" * 12, b"-1"))
        changed[at : at + (len(run) if noise.random() < 0.5 else 1)] = run
    elif kind == 4:
        del changed[at : at + noise.randrange(1, 5)]
    else:
        changed[at:at] = noise.randbytes(noise.randrange(1, 5))
    return bytes(changed)


def _sealed(data: bytes, length: int, noise: random.Random) -> bytes:
    """Damage to the header's JSON or to a tensor's bytes; digests of tensors and header are right, if there is still a header."""
    body, text = data[length:], data[8:length]
    if noise.random() < 0.5:
        body = _altered(body, noise)
    else:
        cut = text.index(b'"peru.digests":"')
        skipped = range(cut, text.index(b'"', cut + 16))
        at = noise.randrange(len(text))
        while at in skipped:
            at = noise.randrange(len(text))
        numbers = [i for i, byte in enumerate(text) if i not in skipped and 48 <= byte <= 57]
        at = noise.choice(numbers) if noise.random() < 0.7 else at
        text = text[:at] + noise.choice((b"0", b"7", b"99999999999", b"-", b"1e9", b"")) + text[at + 1 :]
    head = len(text).to_bytes(8, "little") + text
    header = parse_header(text, len(head) + len(body))
    digests = {}
    for name, info in header.tensors.items():
        tree = TensorDigest(info.dtype, info.shape)
        tree.add(leaves(memoryview(body)[info.begin : info.begin + info.nbytes], info.dtype))
        digests[name] = tree.digest()[: sealed.SHORT]
    at, told = sealed.filled(blank := sealed.blanked(head), digests)
    return blank[:at] + told + blank[at + len(told) :] + body


# -- the plan -----------------------------------------------------------------------------------------


def plan(found: list[Victim], total: int) -> Iterator[tuple[Victim, bool, int]]:
    """Batches in turns: a file, whether it is forged, and the batch's index. Cards, configurations and journals carry no digests."""
    kinds = [(victim, forged) for victim in found for forged in (False, True) if victim.verified is not None or not forged]
    shares = sum(victim.share for victim, _ in kinds)
    wanted = {number: max(1, round(total * victim.share / shares / BATCH)) for number, (victim, _) in enumerate(kinds)}
    for turn in range(max(wanted.values())):
        yield from ((victim, forged, turn) for number, (victim, forged) in enumerate(kinds) if turn < wanted[number])
