"""Malicious headers in files on the Hub: refused, by ranges and through the cache."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.hub.test_faults import MODES
from tests.conftest import run_peru
from tests.support.hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def hostile(table: object, length: int | None = None, data: int = 4096) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(begin: int, end: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "BF16", "shape": [1024] if shape is None else shape, "data_offsets": [begin, end]}


HOSTILE = {
    "a header of 2^62 bytes": hostile({}, 1 << 62),
    "a header as long as the file": hostile({}, 4098),
    "a header of 300 MB": hostile({}, 300 << 20),
    "overlapping tensors": hostile({"a": entry(0, 2048), "b": entry(1024, 3072)}),
    "an offset outside the file": hostile({"a": entry(2048, 1 << 40, [1 << 38])}),
    "an end before its beginning": hostile({"a": entry(2048, 0)}),
    "a negative offset": hostile({"a": entry(-2048, 0)}),
    "a shape of 2^64": hostile({"a": entry(0, 2048, [1 << 62, 4])}),
    "two of one name": struct.pack("<Q", 124)
    + b'{"a":{"dtype":"BF16","shape":[8],"data_offsets":[0,16]},"a":{"dtype":"BF16","shape":[8],"data_offsets":[16,32]}}'.ljust(124)
    + bytes(32),
    "a path as a name": hostile({"../../a\0": entry(0, 2048)}, data=2048),
}


# A process that may allocate 250 MB more than it has.
LITTLE_MEMORY = """
import pathlib, re, resource
status = pathlib.Path("/proc/self/status")
used = int(re.search(r"VmData:\\s+(\\d+)", status.read_text())[1]) << 10 if status.exists() else 350 << 20
resource.setrlimit(resource.RLIMIT_DATA, (used + (250 << 20),) * 2)
"""


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("mode", MODES)
def test_hostile_headers_are_refused_with_little_memory(hub: HubServer, tmp_path: Path, mode: str, what: str) -> None:
    """Refused with little memory; by ranges, only the header is requested."""
    hub.add("org/evil", {"model.safetensors": HOSTILE[what]})
    out = tmp_path / "a.safetensors"
    given = ["prune", "org/evil", "-b", "org/evil", "-o", out, "--lossless", *MODES[mode]]
    failed = run_peru(*given, env=hub.env(tmp_path / "hf"), before=LITTLE_MEMORY)
    assert failed.returncode == 1 and "org/evil@" in failed.stderr and "model.safetensors" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr and "not enough memory" not in failed.stderr and not out.exists()
