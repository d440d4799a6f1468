"""`--stream`: models on the Hub read by ranges, with every byte counted at the server; and network faults within a range."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints.hub.test_reading import model, ok
from tests.conftest import FLOATS, run_peru, start_peru
from tests.support.hub_server import Handler, HubServer, Request

BASE, FINE = "meta/base", "org/fine"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def tensors(seed: int, rows: int = 900, layers: int = 3) -> dict[str, torch.Tensor]:
    """More entries than a sample holds, in several tensors."""
    noise = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(rows, 512, generator=noise).to(FLOATS["bf16"]) for i in range(layers)} | {
        "ids": torch.arange(1000), "norm": torch.randn(333, generator=noise)
    }  # fmt: skip


def changed(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fine-tune: the same one each time."""
    noise = torch.Generator().manual_seed(1)
    return {
        name: (t + torch.randn(t.shape, generator=noise) * 0.01).to(t.dtype) if t.is_floating_point() else t for name, t in base.items()
    }


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    """A base in shards and a fine-tune in one file."""
    base = tensors(0)
    fine = changed(base)
    folders = model(tmp_path / "base", base, shards=2), model(tmp_path / "fine", fine, own=1)
    hub.add(BASE, folders[0])
    hub.add(FINE, folders[1])
    return folders


def command(tmp_path: Path, *more: object) -> tuple[object, ...]:
    return ("prune", FINE, "-b", BASE, "-o", tmp_path / "hub.safetensors", "--base-id", "x/y", "--stream", "--keep", "5%", *more)


_LOCAL: dict[object, bytes] = {}  # results for local files, cached for equal files and options


def local(pair: tuple[Path, Path], tmp_path: Path, *more: object) -> bytes:
    files = [path for folder in pair for path in sorted(folder.glob("*.*"))]
    key = (more, *((path.name, hashlib.sha256(path.read_bytes()).digest()) for path in files))
    if key not in _LOCAL:
        target = tmp_path / "local.safetensors"
        ok(run_peru("prune", f"fine={pair[1]}", "-b", pair[0], "-o", target, "--base-id", "x/y", "--keep", "5%", "--force", *more))
        _LOCAL[key] = target.read_bytes()
    return _LOCAL[key]


def asked(hub: HubServer, name: str) -> list[tuple[int, int]]:
    """Ranges sent of a file, as (first, end), sorted."""
    return sorted((first, last + 1) for first, last in hub.ranges(name))


def times_asked(ranges: list[tuple[int, int]], size: int) -> tuple[int, int]:
    """How often the least and the most requested bytes of a file were requested."""
    marks = torch.zeros(size + 1, dtype=torch.int64)
    for first, end in ranges:
        marks[first] += 1
        marks[end] -= 1
    depth = marks.cumsum(0)[:size]
    return int(depth.min()), int(depth.max())


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_same_artifact_and_nothing_on_disk(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, scope: str) -> None:
    home = tmp_path / "hf"
    ok(run_peru(*command(tmp_path, "--scope", scope), env=hub.env(home)))
    assert (tmp_path / "hub.safetensors").read_bytes() == local(pair, tmp_path, "--scope", scope)
    assert not [path for path in home.rglob("*") if path.is_file()]
    for file in ("base/model-1.safetensors", "base/model-2.safetensors", "fine/model.safetensors"):
        size = (tmp_path / file).stat().st_size
        first, _, _ = file.partition("/")
        ranges = [r for r in hub.requests if r.status == 206 and r.range and r.path.endswith(Path(file).name) and f"/{first}/" in r.path]
        assert times_asked([(r.range[0], r.range[1] + 1) for r in ranges if r.range], size) == (1, 1)  # a model that fits in memory: once
    assert all(r.token is None for r in hub.requests if r.origin == "cdn")


# A process whose limits are changed first: what a model larger than memory meets.
SMALL = """
from peru_cli.vectors import family as taskvectors, thresholds
from peru_cli.methods.compact.magnitude import Window
taskvectors.KEPT_BYTES = {kept}
if {miss}:
    predict = thresholds.predict_window
    windows = [Window.over(0, 10)]
    thresholds.predict_window = lambda *arguments: windows.pop() if windows else predict(*arguments)
"""


def run_small(kept: int, window: str, *arguments: object, env: dict[str, str]) -> str:
    done = run_peru(*arguments, env=env, before=SMALL.format(kept=kept, miss=window == "miss"))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("scope", "kept", "window", "times"),
    [("global", 0, "hit", 3), ("global", 0, "miss", 4), ("tensor", 2_000_000, "hit", 1), ("tensor", 0, "hit", 3)],
)  # where nothing is kept, what is sampled is requested once more than the rest
def test_how_often_each_byte_is_asked_for(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, scope: str, kept: int, window: str, times: int
) -> None:
    arguments = command(tmp_path, "--scope", scope)
    env = hub.env(tmp_path / "hf")
    said = run_small(kept, window, *arguments, "--dry-run", "--json", env=env)
    hub.clear()
    run_small(kept, window, *arguments, "--force", env=env)
    assert (tmp_path / "hub.safetensors").read_bytes() == local(pair, tmp_path, "--scope", scope)
    requests = [r for r in hub.requests if r.status == 206 and r.range and "/fine/" in r.path and r.path.endswith("model.safetensors")]
    ranges = [(r.range[0], r.range[1] + 1) for r in requests if r.range]
    assert times_asked(ranges, weight_bytes(pair[1])) == (1, times)  # once: the header, ids
    if window == "hit":
        headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for folder in pair for f in folder.glob("*.safetensors"))
        index = (pair[0] / "model.safetensors.index.json").stat().st_size
        fetched = hub.fetched()
        planned = json.loads(said[said.index("[") : said.rindex("]") + 1])[0]["fetch_bytes"]
        assert fetched == planned + headers + index


@pytest.mark.parametrize(("kind", "kept", "times"), [("adapter", 128 << 20, 1), ("adapter", 0, 3), ("artifact", 0, 4)])
def test_adapters_and_artifacts_request_no_byte_of_their_base_again(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, kind: str, kept: int, times: int
) -> None:
    """A pass reads the base, and so does the adapter or artifact on it: for each pass, the sample too, and to verify an artifact."""
    made = tmp_path / ("lora" if kind == "adapter" else "delta.safetensors")
    verb, *options = ("svd-lora", "--rank", 2) if kind == "adapter" else ("prune", "--keep", "20%")
    scaled = {name: t * 1.01 if "layers" in name else t for name, t in tensors(0).items()}  # nothing that an adapter cannot hold
    ok(run_peru(verb, model(tmp_path / "scaled", scaled), "-b", pair[0], "-o", made, *options))
    given = ("prune", made, "--base-id", "x/y", "--keep", "5%")
    ok(run_peru(*given, "-b", pair[0], "-o", tmp_path / "local.safetensors"))
    run_small(kept, "hit", *given, "-b", BASE, "-o", tmp_path / "hub.safetensors", "--stream", env=hub.env(tmp_path / "hf"))
    assert (tmp_path / "hub.safetensors").read_bytes() == (tmp_path / "local.safetensors").read_bytes()
    for name in ("model-1.safetensors", "model-2.safetensors"):
        ranges = [(first, last + 1) for first, last in hub.ranges(name)]
        assert times_asked(ranges, (pair[0] / name).stat().st_size) == (1, times)


# -- faults ---------------------------------------------------------------------------------------------


def once(
    answer: Callable[[Handler, Request], None], origin: str = "cdn", times: int = 1, skip: int = 3
) -> Callable[[Handler, Request], bool]:
    """A fault for a few ranges, after the first ones (headers)."""
    lock, seen = threading.Lock(), [0]

    def fault(handler: Handler, request: Request) -> bool:
        if request.origin != "cdn" or request.range is None or not request.path.endswith(".safetensors"):
            return False
        with lock:
            seen[0] += 1
            if not skip < seen[0] <= skip + times:
                return False
        answer(handler, request)
        return True

    return fault


def part(handler: Handler, request: Request, sent: float = 0.5, total: int | None = None, **headers: str) -> None:
    """Begin to answer a range properly, then close the connection."""
    assert request.range is not None
    first, last = request.range
    content = _content(handler, request)
    request.status = 206
    handler.send_response(206)
    size = last - first + 1
    given = {"Content-Length": str(size), "Content-Range": f"bytes {first}-{last}/{total or len(content)}", "ETag": "", **headers}
    if not given["ETag"]:
        from tests.support.hub_server import sha256

        given["ETag"] = f'"{sha256(_path(handler, request))}"'
    for key, value in given.items():
        handler.send_header(key, value)
    handler.end_headers()
    handler.write(content[first : first + int(size * sent)])
    handler.cut()


def _path(handler: Handler, request: Request) -> Path:
    org, name, sha, path = request.path.lstrip("/").split("/", 3)
    found = handler.server.hub.repos[f"{org}/{name}"].commits[sha].files[path]
    assert isinstance(found, Path)
    return found


def _content(handler: Handler, request: Request) -> bytes:
    return _path(handler, request).read_bytes()


RECOVERED = {
    "429": lambda h, r: h.answer(429, Retry_After="1"),
    "500": lambda h, r: h.answer(500),
    "cut": part,
    "cut at once": lambda h, r: h.cut(),
    "short body": lambda h, r: part(h, r, 0.9),
    "lying length": lambda h, r: part(h, r, 1.0, **{"Content-Length": "7"}),
    "another range": lambda h, r: part(h, r, 1.0, **{"Content-Range": "bytes 0-1/2"}),
    "expired address": lambda h, r: h.answer(403),
}


@pytest.mark.parametrize("fault", RECOVERED)
def test_temporary_faults_are_retried(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    hub.fault(once(RECOVERED[fault], times=3 if fault == "500" else 1))
    began = time.monotonic()
    ok(run_peru(*command(tmp_path), env=hub.env(tmp_path / "hf", HF_TOKEN=hub.token)))
    assert (tmp_path / "hub.safetensors").read_bytes() == local(pair, tmp_path)
    if fault == "429":
        assert time.monotonic() - began >= 1.0
    if fault in ("cut", "short body"):  # it continued after the break
        broken = next(r for r in hub.requests if r.range and r.status == 206 and r.sent < r.range[1] - r.range[0] + 1)
        assert broken.range and any(
            r.range == (broken.range[0] + broken.sent, broken.range[1]) for r in hub.requests if r.path == broken.path
        )
    assert all(r.token is None for r in hub.requests if r.origin == "cdn")


def whole(handler: Handler, request: Request) -> None:
    request.range = None
    handler.send_file(_path(handler, request), {})


REFUSED = {
    "ignored range": (whole, "ignores ranges"),
    "changed file": (lambda h, r: part(h, r, 1.0, ETag='"other"'), "changed between two ranges"),
    "endless 503": (lambda h, r: h.answer(503, Retry_After="0"), "status 503"),
    "another size": (lambda h, r: part(h, r, 1.0, total=77), "another size"),
}


AT_ONCE = "from peru_cli.checkpoints.hub import ranges; ranges._pause = lambda seconds, session: None"  # every try, but no waits


@pytest.mark.parametrize("fault", REFUSED)
def test_permanent_faults_are_errors_that_name_the_file(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    answer, words = REFUSED[fault]
    hub.fault(once(answer, times=10**9, skip=7))
    failed = run_peru(*command(tmp_path), env=hub.env(tmp_path / "hf"), before=AT_ONCE)
    assert failed.returncode == 1 and words in failed.stderr, failed.stderr
    assert "safetensors" in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "hub.safetensors").exists()


def test_an_artifact_is_unpacked_onto_a_streamed_base(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = tmp_path / "a.safetensors"
    ok(run_peru("prune", pair[1], "-b", pair[0], "-o", made, "--lossless"))
    hub.add("org/artifact", {"a.safetensors": made})
    ok(run_peru("unpack", "org/artifact", "-b", BASE, "-o", tmp_path / "r.safetensors", "--stream", env=hub.env(tmp_path / "hf")))
    from safetensors.torch import load_file

    from tests.conftest import assert_same_tensors

    assert_same_tensors(tmp_path / "r.safetensors", load_file(pair[1] / "model.safetensors"))
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]


def test_merge_by_ranges_writes_the_same_bytes(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = [tmp_path / "local", tmp_path / "hub"]
    ok(
        run_peru(
            "merge",
            f"a={pair[1]}",
            "-b",
            pair[0],
            "-o",
            out[0],
            "--method",
            "ties",
            "--keep",
            "20%",
            "--base-id",
            "x/y",
            "--config",
            "base",
        )
    )
    more = ("--method", "ties", "--keep", "20%", "--base-id", "x/y", "--config", "base", "--stream")
    ok(run_peru("merge", f"a={FINE}", "-b", BASE, "-o", out[1], *more, env=hub.env(tmp_path / "hf")))
    assert (out[0] / "model.safetensors").read_bytes() == (out[1] / "model.safetensors").read_bytes()
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]


def test_inspect_fetches_headers_only(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    ok(run_peru("inspect", BASE, env=hub.env(tmp_path / "hf")))
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in pair[0].glob("*.safetensors"))
    assert hub.fetched(".safetensors") == headers


def test_a_killed_merge_continues_without_requesting_finished_tensors(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:

    options = ("--method", "task-arithmetic", "--scale", "0.3", "--base-id", "x/y", "--config", "base")
    ok(run_peru("merge", f"a={pair[1]}", "-b", pair[0], "-o", tmp_path / "local", *options))
    env = hub.env(tmp_path / "hf")
    arguments = ("merge", f"a={FINE}", "-b", BASE, "-o", tmp_path / "out", "--stream", "--no-sync", "--threads", "1", *options)
    stuck = threading.Event()

    def stick(handler: Handler, request: Request) -> bool:
        """The last tensor of the fine-tune never arrives."""
        if request.range is None or f"/{FINE}/" not in request.path or not request.range[0] <= last <= request.range[1]:
            return False
        stuck.set()
        time.sleep(60)
        return True

    last = _begin(pair[1] / "model.safetensors", "norm")
    hub.fault(stick)
    process = start_peru(*arguments, env=env)
    assert stuck.wait(60)
    journal = tmp_path / ".out.peru-partial" / ".peru-journal"
    for _ in range(300):
        if journal.exists() and journal.read_bytes().count(b"done") >= 3:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert journal.exists()
    hub.faults.clear()
    hub.clear()
    ok(run_peru(*arguments, env=env))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "local/model.safetensors").read_bytes()
    assert hub.fetched(".safetensors") < 50_000  # headers, the last tensor and the integers


def _begin(path: Path, name: str) -> int:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length + int(json.loads(data[8 : 8 + length])[name]["data_offsets"][0])
