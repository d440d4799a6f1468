"""The Typer app: commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from peru_cli import options, shown
from peru_cli.checkpoints.hub.session import interrupt
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import PATCH_MARKER
from peru_cli.console import console
from peru_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, PeruError, ReportLost, UsageError, from_os_error
from peru_cli.version import __version__

EPILOG = "Exit codes: 0 done, 1 failed, 2 usage, 3 a quality gate was missed, 130 interrupted."

# The commands as the help lists them, and the room of each.
ROOMS = {
    "prune": "prune",
    "unpack": "unpack",
    "merge": "merge",
    "shuffle-pack": "pack",
    "svd-lora": "lora",
    "push": "publish",
    "export": "export",
    "chain": "chain",
    "inspect": "inspect",
    "verify": "verify",
    "eval": "evaluate",
    "route": "route",
    "demo": "demo",
}


def build_app(command: str | None = None) -> typer.Typer:
    """The command line, with all commands, or with one: building them all takes longer than a small model."""
    app = typer.Typer(
        name="peru",
        cls=options.Group,
        help="Store many fine-tunes of one base model for little more than the price of the base, and rebuild each of them.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(main)
    for room in ROOMS.values() if command is None else [ROOMS[command]]:
        import_module(f"peru_cli.{room}.command").register(app)
    return app


@cache
def _built(command: str | None) -> Callable[..., Any]:
    """What typer calls, once in a process: tests and notebooks run many commands, and building one takes as long as a small model."""
    built: Callable[..., Any] = get_command(build_app(command))
    return built


def _version(value: bool) -> None:
    if value:
        print(f"peru {__version__}")
        raise typer.Exit()


_debug = False


def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    """Set what applies to every command."""
    global _debug
    _debug = debug


_pressed = False  # whether Ctrl-C or a request to end has come


def _terminate(signum: int, frame: Any) -> None:
    global _pressed
    _pressed = True
    interrupt()
    raise KeyboardInterrupt  # clean up: remove partial outputs


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code. Prints what failed."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _terminate)
    global _pressed
    _pressed = False
    console.unfinished.clear()
    with inputs.watching() as watch:
        code = _run(arguments, watch)
    try:
        console.close_summary(" ".join(["peru", *(sys.argv[1:] if arguments is None else arguments)]))
    except OSError as error:
        console.error(f"the summary could not be written: {error}")
        return code or EXIT_FAILED
    return code


def _load_help() -> None:
    """Import what prints help without rich's Markdown and tracebacks: peru's help needs neither, and they take a third of the time."""
    unused = {name: ModuleType(name) for name in ("rich.markdown", "rich.traceback") if name not in sys.modules}
    for name, module in unused.items():
        kind = name.removeprefix("rich.").title()
        setattr(module, kind, type(kind, (), {}))
    sys.modules.update(unused)
    try:
        import typer.rich_utils  # noqa: F401
    finally:
        for name in unused:  # other importers get the real modules
            del sys.modules[name]


def _run(arguments: list[str] | None, watch: inputs.Watch) -> int:
    try:
        given = sys.argv[1:] if arguments is None else arguments
        if not given or {"-h", "--help"} & set(given):
            _load_help()
        typed = next((word for word in given if word != "--debug"), None)
        only = typed if typed in ROOMS and typed != "demo" else None  # the demo runs the others
        code = _built(only)(arguments, prog_name="peru", standalone_mode=False)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # typer turns it into an exit code without a message
        return int(code) if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        console.error(f"interrupted: {_left()}")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`peru ... | head`). Point stdout elsewhere, or Python complains while exiting.
        _silence()
        return EXIT_FAILED
    except ReportLost as error:
        _silence()
        done = f"wrote {shown.listed(map(str, watch.written))}, but the" if watch.written else "the"
        console.error(f"{done} report could not be written to stdout: {error.message}")
        return EXIT_FAILED
    except Exception as error:
        if _pressed and not _debug:  # what fails afterwards fails because of it: files are closed that threads still read
            console.error(f"interrupted: {_left()}")
            return EXIT_INTERRUPTED
        return _report(_deeper(error))


def _deeper(error: Exception) -> Exception:
    """If an input changed while it was read, report that instead of the error: what the error says of weights and digests would mislead."""
    if isinstance(error, (PeruError, OSError)) and not isinstance(error, UsageError):
        try:
            inputs.unchanged()
        except PeruError as changed:
            return changed
    return error


def _silence() -> None:
    """Drop what standard output did not accept, or Python tries again while exiting."""
    with contextlib.suppress(OSError, ValueError):  # stdout may have no descriptor; then nothing is left to do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _left() -> str:
    """What an interrupted command leaves behind, and how to continue."""
    left = [path for path in console.unfinished if path.exists()]
    if not left:
        return "nothing unfinished was left behind"
    if half := [path for path in left if path.name == PATCH_MARKER]:
        return f"{half[0].parent} is half patched\n  run the same command again to finish it; until then peru refuses to read it"
    return (
        f"the finished part is kept in {left[0].parent}, in hidden files that end in .peru-partial\n"
        "  run the same command again to continue, or add --force to start over and remove them"
    )


def _usage(error: Any) -> str:
    """What is wrong with the command line, what was probably meant, and where to read more."""
    context = getattr(error, "ctx", None)
    message, path = error.format_message().rstrip("."), context.command_path if context is not None else "peru"
    asked, known = getattr(error, "option_name", None), getattr(context, "command", None)
    if asked is not None and known is not None:
        names = [name for parameter in known.params for name in parameter.opts if name.startswith("--")]
        message = f"no such option: {asked}"
        if close := get_close_matches(asked, names, 1):
            message += f"\n  did you mean {close[0]}?"
    message = message[:1].lower() + message[1:]
    return f"{message}\n  `{path} --help` shows how it is used"


def _report(error: Exception) -> int:
    if _debug:
        console.trace(error)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, TyperException):
        console.error(_usage(error))
        return EXIT_USAGE
    if isinstance(error, PeruError):
        console.error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        console.error(str(from_os_error(error)))
        return EXIT_FAILED
    if isinstance(error, MemoryError):
        console.error("not enough memory: try fewer --threads or smaller --tile-entries")
        return EXIT_FAILED
    console.error(f"a defect in peru: {type(error).__name__}: {error}\n  please report it with the output of `peru --debug ...`")
    return EXIT_FAILED
