"""Ranges straight from the socket: over TLS, behind proxies, and on connections that a server closes."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from tests.checkpoints.hub.test_faults import command, made
from tests.checkpoints.hub.test_reading import ok
from tests.checkpoints.hub.test_stream import AT_ONCE, BASE, FINE, local, model, tensors
from tests.conftest import run_peru
from tests.support.hub_server import Handler, HubServer, Request


def both(hub: HubServer, tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune on a server."""
    folders = model(tmp_path / "base", tensors(0, rows=2500), shards=2), model(tmp_path / "fine", tensors(1, rows=2500), own=1)
    hub.add(BASE, folders[0])
    hub.add(FINE, folders[1])
    return folders


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_over_tls_and_only_with_a_certificate_that_is_trusted(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ours.pem")
    stranger.cert_pem.write_to_path(tmp_path / "other.pem")
    with HubServer(tls=context) as hub:
        pair = both(hub, tmp_path)
        ok(run_peru(*command(tmp_path, "stream"), env=hub.env(tmp_path / "hf", SSL_CERT_FILE=str(tmp_path / "ours.pem"))))
        assert made(tmp_path) == local(pair, tmp_path)
        assert hub.ranges("model.safetensors")
        hub.clear()
        refused = run_peru(
            *command(tmp_path, "stream", "--force"), env=hub.env(tmp_path / "hf", SSL_CERT_FILE=str(tmp_path / "other.pem")), before=AT_ONCE
        )
        assert refused.returncode == 1 and "cannot reach" in refused.stderr and not hub.requests, refused.stderr


def test_storage_whose_certificate_is_not_trusted(tmp_path: Path) -> None:
    """The Hub's own certificate is trusted, so the socket's check is tested."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with HubServer() as hub, HubServer(tls=context) as storage:
        both(hub, tmp_path)

        def elsewhere(handler: Handler, request: Request) -> bool:
            if request.origin == "cdn":
                handler.answer(302, Location=f"{storage.cdn}{request.path}")
            return request.origin == "cdn"

        hub.fault(elsewhere)
        refused = run_peru(*command(tmp_path, "stream"), env=hub.env(tmp_path / "hf"), before=AT_ONCE)
        assert refused.returncode == 1 and "cannot reach" in refused.stderr and not storage.requests, refused.stderr
        assert not (tmp_path / "hub.safetensors").exists()


@pytest.mark.parametrize("spared", [False, True])
def test_a_proxy_is_used_except_for_excluded_hosts(hub: HubServer, tmp_path: Path, spared: bool) -> None:
    pair = both(hub, tmp_path)
    with HubServer() as proxy:
        proxy.repos, proxy.cdn = hub.repos, hub.cdn

        def forward(handler: Handler, request: Request) -> bool:
            request.origin = "cdn" if f":{urlsplit(hub.cdn).port}/" in handler.path else "hub"  # a proxy gets the whole address
            return False

        proxy.fault(forward)
        env = hub.env(tmp_path / "hf", NO_PROXY="localhost" if spared else "", HTTP_PROXY=proxy.url, http_proxy=proxy.url)
        ok(run_peru(*command(tmp_path, "stream"), env=env))
    assert made(tmp_path) == local(pair, tmp_path)
    assert proxy.requests and not any(r.origin == "hub" for r in hub.requests)
    assert any(r.origin == "cdn" for r in proxy.requests) is not spared
    assert any(r.origin == "cdn" for r in hub.requests) is spared


def test_a_server_that_closes_silently_is_asked_again_at_once(hub: HubServer, tmp_path: Path) -> None:
    """Whole bodies, then the connection is closed: no range is requested twice, and no time is lost waiting."""
    pair = both(hub, tmp_path)

    def leave(handler: Handler, request: Request) -> bool:
        if request.origin != "cdn":
            return False
        handler.route(request)
        handler.close_connection = True
        return True

    hub.fault(leave)
    ok(run_peru(*command(tmp_path, "stream"), env=hub.env(tmp_path / "hf")))
    assert made(tmp_path) == local(pair, tmp_path)
    ranges = [(r.path, r.range) for r in hub.requests if r.status == 206]
    assert len(ranges) == len(set(ranges)) > 10


@pytest.mark.parametrize("extra", [0, 1])
def test_a_chunked_body_without_a_length(hub: HubServer, tmp_path: Path, extra: int) -> None:
    """The bytes of the range, or one more, which is an error."""
    pair = both(hub, tmp_path)

    def chunked(handler: Handler, request: Request) -> bool:
        if request.origin != "cdn" or "/fine/" not in request.path or request.range is None:
            return False
        first, last = request.range
        whole = (pair[1] / "model.safetensors").read_bytes()
        body = whole[first : last + 1] + b"x" * extra
        request.status = 206
        handler.send_response(206)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        handler.end_headers()
        for at in range(0, len(body), 10_000):
            piece = body[at : at + 10_000]
            handler.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.write(b"0\r\n\r\n")
        return True

    hub.fault(chunked)
    done = run_peru(*command(tmp_path, "stream"), env=hub.env(tmp_path / "hf"))
    if extra:
        assert done.returncode == 1 and "more bytes than the range has" in done.stderr, done.stderr
        assert not (tmp_path / "hub.safetensors").exists()
    else:
        ok(done)
        assert made(tmp_path) == local(pair, tmp_path)


# A process that asks for small pieces: all connections of a file are in use.
MANY = """
from peru_cli.checkpoints.local import readahead
readahead.PIECE, readahead.CONNECTIONS = 1 << 16, 8
"""


def test_an_address_that_expires_under_all_connections_at_once(hub: HubServer, tmp_path: Path) -> None:
    """Eight requests are in progress when the storage's signature expires: all are refused, and one new address serves them all."""
    pair, expired = both(hub, tmp_path), threading.Event()
    seen: list[Request] = []
    refused: list[Request] = []

    def expire(handler: Handler, request: Request) -> bool:
        if f"/{FINE}/" not in request.path or request.range is None:
            return False
        if request.origin == "hub" and expired.is_set():
            handler.answer(302, Location=f"{hub.cdn}{request.path.replace('/resolve/', '/')}?signature=new")
            return True
        if request.origin == "hub" or request.query["signature"] == "new":
            return False
        with hub.lock:
            seen.append(request)
            if len(seen) <= 4:
                return False
            refused.append(request)
            if len(refused) == 8:
                expired.set()
        expired.wait(5)
        handler.answer(403)
        return True

    hub.fault(expire)
    ok(run_peru(*command(tmp_path, "stream"), env=hub.env(tmp_path / "hf"), before=MANY))
    assert len(refused) >= 8 and (tmp_path / "hub.safetensors").read_bytes() == local(pair, tmp_path)


def test_a_name_with_a_space_in_the_address_of_storage(hub: HubServer, tmp_path: Path) -> None:
    """The test server, like others, writes names into `Location` without escaping."""
    pair = both(hub, tmp_path)
    alone = tmp_path / "alone" / "fine tune é.safetensors"
    alone.parent.mkdir()
    alone.write_bytes((pair[1] / "model.safetensors").read_bytes())
    hub.add("org/spaced", alone.parent)
    options = ("-b", BASE, "--base-id", "x/y", "--keep", "5%", "--stream")
    for fine, out in ((f"hf://models/org/spaced/{alone.name}", "hub"), (alone, "local")):
        ok(run_peru("prune", f"fine={fine}", *options, "-o", tmp_path / f"{out}.safetensors", env=hub.env(tmp_path / "hf")))
    assert made(tmp_path) == (tmp_path / "local.safetensors").read_bytes()
    assert hub.ranges(alone.name)
