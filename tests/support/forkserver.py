"""Run `peru` in its own process without waiting for imports: a server that has imported everything forks one for each command.

The child gets the given environment, folder and files, and reloads huggingface_hub's constants, which depend on the environment
at import. Everything else is as in `python -m peru_cli`. Tests that depend on how an interpreter starts (PYTHON* variables,
import order) need a real one: `run_peru` sees to that."""

from __future__ import annotations

import array
import gc
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parents[2]


class Running:
    """A forked command, like `subprocess.Popen` with captured text. It ends without waiting for its threads."""

    def __init__(self, arguments: list[str], pipe: int, streams: list[IO[bytes]]) -> None:
        self._arguments, self._pipe, self._streams = arguments, pipe, streams
        self.returncode: int | None = None
        self.pid = self._next(300)  # the server may have to start first

    def _next(self, timeout: float | None) -> int:
        """The server's next number: the child's id, then its status in the form of `waitpid`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise subprocess.TimeoutExpired(self._arguments, timeout or 0)
        answer = os.read(self._pipe, 8)
        if not answer:
            raise RuntimeError("the fork server ended")
        number: int = struct.unpack("ii", answer)[1]
        return number

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the command has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(self._next(timeout))
            os.close(self._pipe)
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, None while the command runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill the command."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Stdout and stderr, once the command has ended."""
        self.wait(timeout)
        texts = []
        for stream in self._streams[1:]:
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
        return texts[0], texts[1]


class ForkServer:
    """The client's side: starts the server with the first command, and stops it with this process."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, arguments: list[str], stdin: bytes, env: dict[str, str], timeout: float, code: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run one command, like `subprocess.run` with captured text. `code` is executed first, in the same process."""
        running = self.start(arguments, stdin, env, code)
        try:
            texts = running.communicate(timeout)
        except subprocess.TimeoutExpired:
            running.kill()
            raise
        return subprocess.CompletedProcess(arguments, running.wait(), *texts)

    def start(self, arguments: list[str], stdin: bytes, env: dict[str, str], code: str = "") -> Running:
        """Start one command."""
        streams: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - the command's output is read later
        streams[0].write(stdin)
        streams[0].seek(0)
        reader, writer = os.pipe()
        try:
            fds = [*(stream.fileno() for stream in streams), writer]
            self._send(json.dumps([arguments, env, os.getcwd(), code]).encode(), fds)
        finally:
            os.close(writer)
        return Running(arguments, reader, streams)

    def _send(self, message: bytes, fds: list[int]) -> None:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "tests.support.forkserver", str(theirs.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
            theirs.close()
        self._socket.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])

    def close(self) -> None:
        """Stop the server."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()


def serve(channel: socket.socket) -> None:
    """Fork a child for every request until the client goes away."""
    import importlib

    for name in (
        "huggingface_hub.hf_api",
        "huggingface_hub.file_download",
        "pcodec",
        "blake3",
        "torch",
        "transformers",
        "safetensors.torch",
    ):
        importlib.import_module(name)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401 - importing them is what is meant
    from transformers.models.bert import modeling_bert  # noqa: F401

    import peru_cli

    for path in sorted(Path(peru_cli.__file__).parent.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] not in ("__main__", "gpu", "__init__"):
            importlib.import_module(".".join(parts))
    gc.freeze()  # children would copy each page that the garbage collector marks
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not channel:
                    pid, pipe = key.data
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    os.write(pipe, struct.pack("ii", 1, os.waitpid(pid, 0)[1]))
                    os.close(pipe)
                    continue
                message, ancillary, _, _ = channel.recvmsg(1 << 20, socket.CMSG_SPACE(4 * 4))
                if not message:
                    return
                fds = array.array("i")
                for _, _, data in ancillary:
                    fds.frombytes(data)
                pid = os.fork()
                if pid == 0:
                    channel.close()
                    become(json.loads(message), list(fds))
                for fd in fds[:3]:
                    os.close(fd)
                os.write(fds[3], struct.pack("ii", 0, pid))
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, fds[3]))


def reload_constants() -> None:
    """Let huggingface_hub, which reads the environment at import, read it again."""
    import importlib

    from huggingface_hub import constants, hf_api

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT
    for name, module in list(sys.modules.items()):  # modules that imported a constant by name have the old one
        if name.startswith("huggingface_hub.") and module is not constants:
            vars(module).update({key: value for key, value in vars(constants).items() if key.isupper() and key in vars(module)})


def become(request: list[object], fds: list[int]) -> NoReturn:
    """Be `python -m peru_cli` in the child."""
    code: object = 1
    try:
        arguments, env, folder, before = request
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
            os.close(fd)
        os.close(fds[3])
        os.environ.clear()
        os.environ.update(env)  # type: ignore[call-overload]
        os.chdir(folder)  # type: ignore[arg-type]
        reload_constants()
        sys.argv = ["peru", *arguments]  # type: ignore[misc]
        exec(compile(before, "<before>", "exec"), {})  # type: ignore[call-overload]
        from peru_cli.__main__ import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = 120
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
