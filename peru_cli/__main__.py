"""`peru` and `python -m peru_cli`."""

from __future__ import annotations

import contextlib
import gc
import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    if sys.argv[1:] == ["--version"]:  # answered before the command line is loaded
        from peru_cli.version import __version__

        print(f"peru {__version__}")
        return
    gc.set_threshold(200_000)  # loading torch makes a million permanent objects: scanning them costs 0.2 s
    try:
        from peru_cli.cli import run

        code = run()
    except KeyboardInterrupt:  # before the command line was loaded
        print("error: interrupted: nothing unfinished was left behind", file=sys.stderr)
        code = 130
    if code == 130:
        # Interrupted while an extension module was being loaded, Python has recorded an unhandled interrupt and would exit as if killed.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
