"""`peru` and `python -m peru_cli`."""

from __future__ import annotations

import contextlib
import gc
import os
import sys


def main() -> None:
    """Run the command line; exits with its code."""
    if sys.argv[1:] == ["--version"]:  # answered without loading the command line's machinery
        from peru_cli.version import __version__

        print(f"peru {__version__}")
        return
    gc.set_threshold(200_000)  # torch makes a million lasting objects while loading: looking through them costs 0.2 s
    try:
        from peru_cli.cli import run

        code = run()
    except KeyboardInterrupt:  # before the command line was loaded
        print("error: interrupted: nothing unfinished was left behind", file=sys.stderr)
        code = 130
    if code == 130:
        # Where an extension module was being loaded, Python has noted an interrupt that nobody caught, and would end as if killed.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
