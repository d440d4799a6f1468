"""Malicious headers in files on the Hub: refused, by ranges and through the cache."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.hub.test_faults import MODES
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


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("mode", MODES)
def test_hostile_headers(hub: HubServer, tmp_path: Path, mode: str, what: str) -> None:
    """Refused with little memory; by ranges, only the header is requested."""
    hub.add("org/evil", {"model.safetensors": HOSTILE[what]})
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (600 << 20,) * 2); from peru_cli import cli; "
    limited += "raise SystemExit(cli.run(sys.argv[1:]))"
    out = tmp_path / "a.safetensors"
    given = [sys.executable, "-c", limited, "prune", "org/evil", "-b", "org/evil", "-o", str(out), "--lossless", *MODES[mode]]
    failed = subprocess.run(given, env={**os.environ, **hub.env(tmp_path / "hf")}, capture_output=True, text=True, timeout=100)
    assert failed.returncode == 1 and "org/evil@" in failed.stderr and "model.safetensors" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr and "not enough memory" not in failed.stderr and not out.exists()
