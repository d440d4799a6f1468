"""The commands that are killed, interrupted and run on full disks: every one that writes, in each of its forms, and those that read."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3
from commands import OPTIONS, again, loras, reading_only, whole, with_data
from hub import Hub
from outputs import Command, family, makers, peru
from running import Run

BIG = (50, 1000, 2000)  # layers, rows and columns: 200 MB in bfloat16
SMALLER = (50, 200, 1000)  # 20 MB
SMALL = (10, 200, 1000)  # 4 MB
MIDDLING = (8, 300, 300)
PARTLY = "some of its outputs, each whole"  # of a command with several outputs
MATCH = re.compile("")  # names of the commands to run


def visible(path: Path) -> list[Path]:
    """A file, or a folder's files without those that peru has not finished."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in found if not any(".peru-" in part for part in file.relative_to(path.parent).parts)]


def digest(path: Path) -> str | None:
    """Digest of a file, or of a folder's visible files and their names. None if there is nothing."""
    total, found = blake3(), visible(path)
    for file in found:
        total.update(str(file.relative_to(path)).encode() + b"\0")
        total.update_mmap(str(file)) if file.stat().st_size else None
    return total.hexdigest() if found else None


class Case:
    """A command that writes one output into its own folder, or none (then its target never exists).

    `start` is a folder that the output begins as; the command changes a copy of it."""

    def __init__(self, name: str, command: Command, target: Path, inputs: Path, start: Path | None = None) -> None:
        self.name, self.command, self.target, self.inputs, self.begin = name, command, target, inputs, start
        self.env: dict[str, str] = {}
        self.reference: str | None = None
        self.initial: str | None = None
        self.before: str | None = None  # of the inputs
        self.seconds = 0.0

    @property
    def place(self) -> Path:
        """The path of the output."""
        return self.target.parent

    def start(self, command: Command | None = None, said: str = "said") -> Run:
        """Start the command, or another one."""
        return Run(command or self.command, self.place.with_name(f"{self.place.name}-{said}"), self.env)

    def measure(self) -> None:
        """Run it once, undisturbed."""
        self.clear()
        self.before, self.initial = digest(self.inputs), self.found()
        began = time.monotonic()
        run = self.start()
        code = run.wait()
        assert code == 0, f"{self.name}: exit {code}: {run.said}"
        self.seconds, self.reference = time.monotonic() - began, self.found()

    def clear(self) -> None:
        """Restore the state before any run."""
        self.empty()
        self.prepare()

    def empty(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.place)
        self.place.mkdir()

    def prepare(self) -> None:
        """Write what must exist before a run."""
        if self.begin is not None:
            shutil.copytree(self.begin, self.target)

    def found(self) -> str | None:
        """The digest of the output as it is now. None if there is nothing."""
        return digest(self.target)

    def others(self) -> list[str]:
        """What is beside the output, and what is unfinished in it."""
        unfinished = [path.name for path in self.target.rglob(".*.peru-*")] if self.target.is_dir() else []
        return sorted([path.name for path in self.place.iterdir() if path != self.target] + unfinished)

    def state(self) -> str:
        """The current state: nothing, the whole output, or something that must not exist."""
        strangers = [name for name in self.others() if not (name.startswith(".") and ".peru-" in name)]
        found = self.found()
        if strangers:
            return f"LEFT {strangers}"
        return "complete" if found == self.reference else "as before" if found == self.initial else self.between()

    def between(self) -> str:
        """The state of what is neither old nor new."""
        return "OTHER BYTES"

    def finishes(self) -> str:
        """Run it again: whether it gives the undisturbed result, and leaves nothing else."""
        code = self.start(self.again()).wait()
        same = code == 0 and self.found() == self.reference and not self.others()
        return "then finished, same bytes" if same else f"LATER EXIT {code}, {self.state().upper()}, {self.others()}"

    def again(self) -> Command:
        """The command that finishes what was stopped."""
        return self.command

    def inputs_changed(self) -> bool:
        """Whether any of its inputs has changed."""
        return digest(self.inputs) != self.before


class ChainCase(Case):
    """A command that changes several links of a chain, one after another: in between, each step that must stay is there, unchanged."""

    def __init__(self, name: str, command: Command, target: Path, inputs: Path, start: Path, kept: set[int]) -> None:
        super().__init__(name, command, target, inputs, start)
        self._kept = kept

    def between(self) -> str:
        """Partly done, if `peru chain` finds no step lost or changed."""
        assert self.begin is not None
        now, old = self._steps(self.target), self._steps(self.begin)
        sound = self.start(["chain", "verify", self.target], "checked").wait() == 0
        return "partly done, no step lost" if sound and now.items() <= old.items() and now.keys() >= self._kept else "STEPS LOST"

    def _steps(self, chain: Path) -> dict[int, str]:
        run = self.start(["chain", "list", chain, "--json", "--quiet"], "checked")
        assert run.wait() == 0, run.said
        return {link["step"]: link["result"] for link in json.loads(run.said)}


class HubCase(Case):
    """A command that publishes, with or without an output of its own: one commit that holds all of it, or none."""

    def __init__(self, name: str, command: Command, target: Path, inputs: Path, hub: Hub) -> None:
        super().__init__(name, command, target, inputs)
        self._hub, self.env = hub, hub.environment

    def prepare(self) -> None:
        """Forget every repo."""
        self._hub.clear()

    def found(self) -> str:
        """Digests of the local output and of the published files."""
        return f"{digest(self.target)} {self._hub.found()}"

    def between(self) -> str:
        """Only the local output may be there alone."""
        written = str(self.reference).split()[0]
        return "complete, not yet published" if self.found() == f"{written} None" else "OTHER BYTES"

    def again(self) -> Command:
        """Publish what is complete, as the message says."""
        return ["push", self.target, Hub.REPO] if self.command[0] == "prune" and self.target.exists() else self.command


class DemoCase(Case):
    """`peru demo -o`: it runs many commands, whose outputs appear one by one."""

    _all: dict[str, str | None]

    def between(self) -> str:
        """Files that the whole output has, too, and nothing else."""
        return PARTLY if self._files().items() <= self._all.items() else "OTHER BYTES"

    def measure(self) -> None:
        """Run it once, undisturbed."""
        super().measure()
        self._all = self._files()

    def _files(self) -> dict[str, str | None]:
        names = {path.relative_to(self.target): digest(path) for path in visible(self.target)} if self.target.exists() else {}
        return {str(name): found for name, found in names.items() if name.parts[0] != "untrained"}  # these no command writes

    def again(self) -> Command:
        """It does not continue: begin anew."""
        self.clear()
        return self.command


@contextmanager
def cases(size: tuple[int, int, int], wanted: Callable[[str], bool] = lambda name: True, reading: bool = False) -> Iterator[Iterator[Case]]:
    """Every wanted writing command on a family of models of this size, in memory; with `reading`, commands that only read, too."""
    with tempfile.TemporaryDirectory(prefix="peru-trust-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        hub = Hub(Path(name) / "home")
        try:
            yield _made(Path(name), size, lambda command: bool(MATCH.search(command)) and wanted(command), reading, hub)
        finally:
            hub.stop()


def _warm(folder: Path) -> None:
    """Import in this process what each fork would otherwise import again."""
    folder.mkdir()
    inputs, made = folder / "inputs", folder / "made"
    inputs.mkdir()
    made.mkdir()
    for command in makers(inputs, family(inputs), made).values():
        code, said = peru(*command)
        assert code == 0, said
    assert peru("unpack", made / "adapter", "-b", inputs / "base.safetensors", *OPTIONS, "-o", folder / "x")[0] == 0
    import huggingface_hub.hf_api  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    from peru_cli.chain import verify  # noqa: F401
    from peru_cli.evaluate import run  # noqa: F401
    from peru_cli.export import patches  # noqa: F401
    from peru_cli.inspect import run as inspect_run  # noqa: F401
    from peru_cli.merge import recipe  # noqa: F401
    from peru_cli.publish import run as publish_run  # noqa: F401


def _made(folder: Path, size: tuple[int, int, int], wanted: Callable[[str], bool], reading: bool, hub: Hub) -> Iterator[Case]:
    inputs, made = folder / "inputs", folder / "made"
    inputs.mkdir()
    made.mkdir()
    tasks = family(inputs, *size)
    _warm(folder / "warm")

    def target_of(name: str, target: str) -> Path:
        place = folder / f"case-{name.replace(' ', '-')}"
        place.mkdir()
        return place / target

    def case(name: str, target: str | None, command: Command, given: Path = inputs) -> Case:
        path = target_of(name, target or "nothing")
        return Case(name, [*command, "-o", path] if target else command, path, given)

    def prepare(name: str) -> None:
        base: Command = ["-b", inputs / "base.safetensors", *OPTIONS]
        commands = makers(inputs, tasks, made) | {
            "one.safetensors": ["shuffle-pack", tasks[1], *base, "-o", made / "one.safetensors"],
            "plain.safetensors": ["prune", inputs / "c.safetensors", "--keep", "10%", *base, "-o", made / "plain.safetensors"],
            "layers.safetensors": ["prune", inputs / "w.safetensors", "--keep", "5%", *base, "-o", made / "layers.safetensors"],
        }
        if name == "loras":
            loras(made, size)
        elif not (made / name).exists():
            run = Run(commands[name], folder / "said")
            assert run.wait() == 0, run.said

    for name, (target, command) in whole(inputs, tasks).items():
        if wanted(name):
            yield case(name, target, command)
    for name, (needs, target, command) in again(inputs, tasks[0], made).items():
        if wanted(name):
            prepare(needs)
            yield case(name, target, command)
    if reading:
        for name, (needs, command) in reading_only(inputs, tasks, made).items():
            if wanted(name):
                prepare(needs)
                yield case(name, None, command)
        data = folder / "data"
        data.mkdir()
        for name, output, command in with_data(data):
            if wanted(name):
                yield case(name, output, command, data)
    yield from _chains(inputs, made, tasks, target_of, wanted)
    yield from _published(inputs, made, prepare, tasks, target_of, wanted, hub)
    if wanted("demo"):
        path = target_of("demo", "x")
        yield DemoCase("demo", ["demo", "-o", path], path, inputs)


def _chains(
    inputs: Path, made: Path, tasks: list[str], target_of: Callable[[str, str], Path], wanted: Callable[[str], bool]
) -> Iterator[Case]:
    """Commands that write chains, and what is in chains."""
    run = made / "run"
    models = [inputs / "base.safetensors", *(task.partition("=")[2] for task in tasks), inputs / "c.safetensors"]

    def chain() -> Path:
        for step, model in enumerate(models, 1):
            if not (run / f"step-{step}.safetensors").exists():
                added = Run(["chain", "add", run, model, "--step", step, *OPTIONS], made / "said")
                assert added.wait() == 0, added.said
        return run

    if wanted(name := "chain add whole"):
        path = target_of(name, "run")
        yield Case(name, ["chain", "add", path, models[1], "--step", 1, *OPTIONS], path, inputs)
    if wanted(name := "chain add"):
        path = target_of(name, "run")
        yield Case(name, ["chain", "add", path, models[1], "--step", 5, *OPTIONS], path, inputs, chain())
    for name, output, command in (
        ("chain get", "x", ["chain", "get", chain, 3]),
        ("chain squash to a file", "x.safetensors", ["chain", "squash", chain, 1, 4]),
    ):
        if wanted(name):
            path = target_of(name, output)
            yield Case(name, [*(part() if part is chain else part for part in command), "-o", path, *OPTIONS], path, run)
    for name, arguments, kept in (
        ("chain squash", [1, 3], {1, 3, 4}),
        ("chain prune", ["--keep-every", 2], {2, 4}),
    ):
        if wanted(name):
            path = target_of(name, "run")
            yield ChainCase(name, [*name.split(), path, *arguments, *OPTIONS], path, inputs, chain(), kept)


def _published(
    inputs: Path, made: Path, prepare: Callable[[str], None], tasks: list[str], target_of: Callable[[str, str], Path],
    wanted: Callable[[str], bool], hub: Hub,
) -> Iterator[Case]:  # fmt: skip
    """Commands that publish."""
    if wanted(name := "push"):
        prepare("sparse.safetensors")
        path = target_of(name, "nothing")
        yield HubCase(name, ["push", made / "sparse.safetensors", Hub.REPO], path, inputs, hub)
    if wanted(name := "prune --push"):
        path = target_of(name, "x.safetensors")
        command: Command = ["prune", tasks[0], "--keep", "10%", "-b", inputs / "base.safetensors", *OPTIONS, "--push", Hub.REPO]
        yield HubCase(name, [*command, "-o", path], path, inputs, hub)
