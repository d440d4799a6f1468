"""Faults of servers, networks and hostile files, by ranges and through the cache: the right bytes, or an error that says what is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints.hub.test_reading import ok
from tests.checkpoints.hub.test_stream import AT_ONCE, BASE, FINE, RECOVERED, changed, local, model, once, part, tensors, whole
from tests.conftest import run_peru
from tests.support.hub_server import Handler, HubServer, Request

MODES = {"stream": ("--stream",), "cache": ()}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    """A base in shards and a fine-tune in one file, large enough to be fetched in several ranges."""
    base = tensors(0, rows=2500)
    folders = model(tmp_path / "base", base, shards=2), model(tmp_path / "fine", changed(base), own=1)
    hub.add(BASE, folders[0])
    hub.add(FINE, folders[1])
    return folders


def command(tmp_path: Path, mode: str, *more: object) -> tuple[object, ...]:
    given = ("prune", FINE, "-b", BASE, "-o", tmp_path / "hub.safetensors", "--base-id", "x/y", "--keep", "5%")
    return (*given, *MODES[mode], *more)


def made(tmp_path: Path) -> bytes:
    return (tmp_path / "hub.safetensors").read_bytes()


@pytest.mark.parametrize("fault", [*RECOVERED, "500 burst"])
def test_temporary_faults_are_retried_through_the_cache(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    """As in test_hub_stream for ranges alone."""
    answer = RECOVERED[fault.removesuffix(" burst")]
    hub.fault(once(answer, times=4 if "burst" in fault else 1, skip=1))
    ok(run_peru(*command(tmp_path, "cache"), env=hub.env(tmp_path / "hf", HF_TOKEN=hub.token)))
    assert made(tmp_path) == local(pair, tmp_path)
    assert all(r.token is None for r in hub.requests if r.origin == "cdn") and any(r.token == hub.token for r in hub.requests)
    if fault == "cut":  # it continued after the break: nothing received was requested again
        assert hub.fetched("model.safetensors") == (pair[1] / "model.safetensors").stat().st_size


def test_a_cache_behind_a_server_that_ignores_ranges(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    def ignore(handler: Handler, request: Request) -> bool:
        if request.origin == "cdn":
            whole(handler, request)
        return request.origin == "cdn"

    hub.fault(ignore)
    ok(run_peru(*command(tmp_path, "cache"), env=hub.env(tmp_path / "hf")))
    assert made(tmp_path) == local(pair, tmp_path)


WRONG = {
    "changed etag": (lambda h, r: part(h, r, 1.0, ETag='"other"' if r.range[0] else ""), "changed between two ranges"),
    "another size": (lambda h, r: part(h, r, 1.0, total=77), "another size"),
    "endless 503": (lambda h, r: h.answer(503, Retry_After="0"), "status 503"),
    "never ends": (lambda h, r: part(h, r, 1.0, **{"Content-Length": "99999999"}), "another range"),
}


# Faults that are retried to the end take half a minute through the cache, which requests the same ranges.
@pytest.mark.parametrize(("mode", "fault"), [*(("stream", fault) for fault in WRONG), ("cache", "changed etag"), ("cache", "endless 503")])
def test_permanent_faults_are_errors(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, mode: str, fault: str) -> None:
    answer, words = WRONG[fault]
    hub.fault(once(answer, times=10**9, skip=8 if mode == "stream" else 1))
    failed = run_peru(*command(tmp_path, mode), env=hub.env(tmp_path / "hf"), before=AT_ONCE)
    assert failed.returncode == 1 and words in failed.stderr and "safetensors" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "hub.safetensors").exists()


def test_other_bytes_than_the_hub_lists_never_reach_the_cache(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same size, the same ETag, one byte changed: only the digest shows it; also if ranges are ignored."""
    target = pair[1] / "model.safetensors"
    good = target.read_bytes()
    for ranges in (True, False):

        def lie(handler: Handler, request: Request, ranges: bool = ranges) -> bool:
            if request.origin != "cdn" or "/fine/" not in request.path:
                return False
            first, last = request.range or (0, len(good) - 1)
            bad = good[:-1] + bytes([good[-1] ^ 1])
            from tests.support.hub_server import sha256

            headers = {"Content_Range": f"bytes {first}-{last}/{len(good)}"} if ranges else {}
            body = bad[first : last + 1] if ranges else bad
            handler.answer(206 if ranges else 200, body, ETag=f'"{sha256(target)}"', **headers)
            return True

        hub.fault(lie)
        failed = run_peru(*command(tmp_path, "cache"), env=hub.env(tmp_path / "hf"))
        assert failed.returncode == 1 and "other bytes than it lists" in failed.stderr, failed.stderr
        hub.faults.clear()
    ok(run_peru(*command(tmp_path, "cache"), env=hub.env(tmp_path / "hf")))
    assert made(tmp_path) == local(pair, tmp_path)


@pytest.mark.parametrize(("mode", "skip"), [("cache", 0), ("stream", 0), ("stream", 6)])
def test_ctrl_c_works_while_storage_does_not_answer(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, mode: str, skip: int) -> None:
    """In a download, in headers, in a pass: an interrupt waits for no request of any thread, and for no later one."""
    asked, answer, seen = threading.Event(), threading.Event(), []

    def hang(handler: Handler, request: Request) -> bool:
        if request.origin == "cdn" and request.path.endswith(".safetensors"):
            seen.append(request)
            if len(seen) > skip:
                asked.set()
                answer.wait(60)
        return False

    hub.fault(hang)
    words = [sys.executable, "-m", "peru_cli", *map(str, command(tmp_path, mode))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, **hub.env(tmp_path / "hf")})
    try:
        assert asked.wait(60)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=15)
    finally:
        answer.set()
        process.kill()
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr, stderr
    assert not (tmp_path / "hub.safetensors").exists()


# A process whose file system has no locks.
NO_LOCKS = """
import errno, fcntl, os
def flock(fd, how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
"""


@pytest.mark.parametrize("mode", MODES)
def test_file_systems_without_locks(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, mode: str) -> None:
    """Like Lustre mounted without flock: huggingface_hub downloads, with locks of another kind, and peru checks."""
    ok(run_peru(*command(tmp_path, mode), env=hub.env(tmp_path / "hf"), before=NO_LOCKS))
    assert made(tmp_path) == local(pair, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "incomplete" in path.name or "partial" in path.name]


def test_a_cached_file_that_lost_its_end(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """After the file named in the error is deleted, it is downloaded again."""
    env = hub.env(tmp_path / "hf")
    ok(run_peru(*command(tmp_path, "cache"), env=env))
    cached = next((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))
    os.truncate(cached, 1000)
    failed = run_peru(*command(tmp_path, "cache", "--force"), env=env)
    assert failed.returncode == 1 and "1000 bytes in the cache" in failed.stderr, failed.stderr
    named = re.search(r"delete (.*) and try again", failed.stderr)
    assert named
    Path(named[1]).unlink()
    ok(run_peru(*command(tmp_path, "cache", "--force"), env=env))
    assert made(tmp_path) == local(pair, tmp_path)


def test_a_cache_on_a_full_disk(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, small_disk: Path) -> None:
    failed = run_peru(*command(tmp_path, "cache"), env=hub.env(small_disk / "hf"))
    assert failed.returncode == 1 and "needs 2,5" in failed.stderr and "set HF_HOME" in failed.stderr, failed.stderr
    assert not hub.fetched(".safetensors")


@pytest.mark.parametrize("mode", MODES)
def test_a_redirect_from_storage_to_a_third_origin(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, mode: str) -> None:
    with HubServer() as third:
        third.add(BASE, pair[0])
        third.add(FINE, pair[1])

        def elsewhere(handler: Handler, request: Request) -> bool:
            if request.origin != "cdn":
                return False
            handler.answer(302, Location=f"{third.cdn}{request.path}?signature=def")
            return True

        hub.fault(elsewhere)
        ok(run_peru(*command(tmp_path, mode), env=hub.env(tmp_path / "hf", HF_TOKEN=hub.token)))
        assert made(tmp_path) == local(pair, tmp_path)
        assert third.requests and all(r.token is None and hub.token not in str(r.headers) for r in third.requests)


@pytest.mark.parametrize("mode", MODES)
def test_gated_missing_and_moved(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, mode: str) -> None:
    env = hub.env(tmp_path / "hf")
    hub.add("org/gated", pair[1], gated=True)
    more = ("-b", BASE, "-o", tmp_path / "a.safetensors", "--keep", "5%", *MODES[mode])
    for name, words in (("org/gated", "is gated"), (f"{FINE}@v9", "has no revision 'v9'"), ("org/none", "no such repo")):
        failed = run_peru("prune", name, *more, env=env)
        assert failed.returncode == 1 and words in failed.stderr and not (tmp_path / "a.safetensors").exists(), failed.stderr
    index = json.dumps({"weight_map": {"a": "../../meta/base/model-1.safetensors"}}).encode()
    hub.add("org/evil", {"model.safetensors.index.json": index})
    failed = run_peru("prune", "org/evil", *more, env=env)
    assert failed.returncode == 1 and "not a plain file name" in failed.stderr


@pytest.mark.parametrize("what", ["inspect", "prune", "stream", "unpack"])
def test_no_error_shows_the_token_even_if_the_server_repeats_it(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    """In the answer's body, its headers and the address of a redirect; with --debug, so tracebacks too."""
    token = "hf_" + "Zq7" * 11

    def repeat(handler: Handler, request: Request) -> bool:
        if request.origin == "hub" and "/api/" not in request.path:
            said = f"token {request.token} refused"
            handler.answer(
                403, said.encode(), X_Error_Message=said, Location=f"http://u:{request.token}@127.0.0.1:9/?X-Signature=Deadbeef1234"
            )
            return True
        return False

    hub.token = token
    hub.fault(repeat)
    given = {
        "inspect": ("inspect", FINE, "--json"), "prune": command(tmp_path, "cache"), "stream": command(tmp_path, "stream"),
        "unpack": ("unpack", FINE, "-b", BASE, "-o", tmp_path / "r"),
    }[what]  # fmt: skip
    failed = run_peru("--debug", *given, env=hub.env(tmp_path / "hf", HF_TOKEN=token))
    said = failed.stdout + failed.stderr
    assert failed.returncode in (1, 2) and "Traceback" in said
    assert token not in said and token[3:20] not in said and "Deadbeef1234" not in said
    assert any(request.token == token for request in hub.requests)


def test_offline_ranges_are_refused_and_cached_files_are_read(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Ranges are unavailable; files in the cache are read there."""
    env = hub.env(tmp_path / "hf")
    cold = run_peru(*command(tmp_path, "stream"), env={**env, "HF_HUB_OFFLINE": "1"})
    assert cold.returncode == 1 and "HF_HUB_OFFLINE is set" in cold.stderr and not hub.requests
    ok(run_peru(*command(tmp_path, "cache"), env=env))
    hub.clear()
    ok(run_peru(*command(tmp_path, "stream", "--force"), env={**env, "HF_HUB_OFFLINE": "1"}))
    assert made(tmp_path) == local(pair, tmp_path) and not hub.requests


# -- slowness, and downloads that break -----------------------------------------------------------------


def trickle(pause: float) -> Callable[[Handler, Request], bool]:
    """A fault: storage sends 64 KB at a time, with pauses."""

    def slow(handler: Handler, request: Request) -> bool:
        if request.origin != "cdn" or request.range is None:
            return False
        org, name, sha, path = request.path.lstrip("/").split("/", 3)
        content = handler.server.hub.repos[f"{org}/{name}"].commits[sha].files[path]
        assert isinstance(content, Path)
        data, (first, last) = content.read_bytes(), request.range
        from tests.support.hub_server import sha256

        request.status = 206
        handler.send_response(206)
        for key, value in {
            "Content-Length": str(last - first + 1), "Content-Range": f"bytes {first}-{last}/{len(data)}", "ETag": f'"{sha256(content)}"'
        }.items():  # fmt: skip
            handler.send_header(key, value)
        handler.end_headers()
        for at in range(first, last + 1, 1 << 16):
            handler.write(data[at : min(at + (1 << 16), last + 1)])
            handler.wfile.flush()
            time.sleep(pause)
        return True

    return slow


def on_a_terminal(given: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Exit code and terminal output."""
    pid, fd = pty.fork()
    if not pid:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        os.execve(given[0], given, env)
    shown = b""
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            break
        if not data:
            break
        shown += data
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_server_takes_longer_than_the_time_out_and_shows_progress(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, mode: str
) -> None:
    hub.fault(trickle(0.05))
    env = {**os.environ, **hub.env(tmp_path / "hf", HF_HUB_DOWNLOAD_TIMEOUT="1"), "TERM": "xterm", "COLUMNS": "100"}
    began = time.monotonic()
    given = [sys.executable, "-m", "peru_cli", *map(str, command(tmp_path, mode)), "--tile-entries", "16384"]
    code, shown = on_a_terminal(given, env)
    assert code == 0, shown
    assert time.monotonic() - began > 3 and made(tmp_path) == local(pair, tmp_path)
    assert len(set(re.findall(r"(\d+)%", shown))) > 2, shown
    assert not [r for r in hub.requests if r.range and r.status == 206 and r.sent < r.range[1] - r.range[0] + 1]  # none was aborted


def test_a_silent_server_is_asked_again(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    def silent(handler: Handler, request: Request) -> None:
        time.sleep(4)
        handler.cut()

    hub.fault(once(silent, times=1, skip=5))
    ok(run_peru(*command(tmp_path, "stream"), env=hub.env(tmp_path / "hf", HF_HUB_DOWNLOAD_TIMEOUT="1")))
    assert made(tmp_path) == local(pair, tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_continues(hub: HubServer, tmp_path: Path, sent: signal.Signals) -> None:
    """The same bytes are not requested twice, whichever process asks: huggingface_hub would restart the file."""
    import torch

    base = {f"layers.{i}.weight": torch.randn(2000, 4096).bfloat16() for i in range(3)}
    folder = model(tmp_path / "big", base)
    size = (folder / "model.safetensors").stat().st_size
    hub.add("org/big", folder)
    home = tmp_path / "hf"
    given = ["prune", "org/big", "-b", folder, "-o", tmp_path / "a.safetensors", "--lossless"]
    hub.fault(trickle(0.01))
    first = subprocess.Popen(
        [sys.executable, "-m", "peru_cli", *map(str, given)], env={**os.environ, **hub.env(home)}, stderr=subprocess.PIPE
    )
    left = 0
    for _ in range(1000):
        parts = list(home.rglob("*.peru-incomplete"))
        left = parts[0].stat().st_size if parts else 0
        if left > size // 3:
            break
        time.sleep(0.02)
    first.send_signal(sent)
    first.communicate()
    (unfinished,) = home.rglob("*.peru-incomplete")
    left = unfinished.stat().st_size
    assert size // 3 < left < size
    hub.faults.clear()
    time.sleep(0.5)
    hub.clear()
    ok(run_peru(*given, env=hub.env(home)))
    assert hub.fetched(".safetensors") == size - left
    (blob,) = [path for path in home.rglob("blobs/*") if path.stat().st_size == size]
    assert blob.read_bytes() == (folder / "model.safetensors").read_bytes() and not unfinished.exists()
    hub.clear()
    ok(run_peru(*given, "--force", env=hub.env(home, HF_HUB_OFFLINE="1")))
    assert not hub.requests


def test_two_downloads_of_one_file_share_it(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    hub.fault(trickle(0.05))
    env = {**os.environ, **hub.env(tmp_path / "hf")}
    given = [sys.executable, "-m", "peru_cli", "prune", FINE, "-b", str(pair[0]), "--keep", "5%", "--base-id", "x/y", "-o"]
    both = [subprocess.Popen([*given, str(tmp_path / f"{i}.safetensors")], env=env, stderr=subprocess.PIPE) for i in range(2)]
    for process in both:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    assert [(tmp_path / f"{i}.safetensors").read_bytes() for i in range(2)] == [local(pair, tmp_path)] * 2
    assert hub.fetched("model.safetensors") == (pair[1] / "model.safetensors").stat().st_size


def test_a_damaged_unfinished_download_is_detected(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    from tests.support.hub_server import sha256

    target = pair[1] / "model.safetensors"
    blobs = tmp_path / "hf/hub/models--org--fine/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(target)}.peru-incomplete").write_bytes(bytes(1 << 20))
    failed = run_peru(*command(tmp_path, "cache"), env=hub.env(tmp_path / "hf"))
    assert failed.returncode == 1 and "other bytes than it lists" in failed.stderr
    ok(run_peru(*command(tmp_path, "cache"), env=hub.env(tmp_path / "hf")))
    assert made(tmp_path) == local(pair, tmp_path)
