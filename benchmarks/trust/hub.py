"""The tests' Hub in a process of its own, so that no thread of it is there when commands are forked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.hub_writes import TOKEN, HubServer


class _Server(HubServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed in the middle are expected."""


class Hub:
    """A Hub on loopback with one repo, which commands of the campaign publish to."""

    REPO = "me/published"
    _FORGET = "/forget"

    def __init__(self, home: Path) -> None:
        ready, told = os.pipe()
        until, self._alive = os.pipe()  # closed when this process ends, however it ends
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(ready)
                os.close(self._alive)
                threading.Thread(target=lambda: (os.read(until, 1), os._exit(0)), daemon=True).start()
                server = _Server()

                def before(_: str, path: str) -> int | None:
                    if path == self._FORGET:
                        server.repos.clear()
                        server.stored.clear()
                        server.log.clear()
                        return 200
                    return None

                server.before = before
                os.write(told, server.endpoint.encode())
                os.close(told)
                server.serve_forever()
            finally:
                os._exit(1)
        os.close(told)
        os.close(until)
        with open(ready) as pipe:
            self._endpoint = pipe.read()
        self.environment = {
            "HF_ENDPOINT": self._endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*",
        }  # fmt: skip

    def clear(self) -> None:
        """Forget every repo and upload."""
        self._ask(self._FORGET)

    def found(self) -> str | None:
        """The published files with their digests. None if there are none."""
        try:
            about = json.loads(self._ask(f"/api/models/{self.REPO}"))
        except urllib.error.HTTPError as error:
            assert error.code == 404, error
            return None
        files = {file["rfilename"]: file["blobId"] for file in about["siblings"] if file["rfilename"] != ".gitattributes"}
        return json.dumps(files, sort_keys=True).replace(" ", "") if files else None

    def stop(self) -> None:
        """End its process."""
        os.close(self._alive)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _ask(self, path: str) -> bytes:
        request = urllib.request.Request(self._endpoint + path, headers={"Authorization": f"Bearer {TOKEN}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return bytes(answer.read())
