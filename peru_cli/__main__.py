"""`peru` and `python -m peru_cli`."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line; exits with its code."""
    if sys.argv[1:] == ["--version"]:  # answered without loading the command line's machinery
        from peru_cli import __version__

        print(f"peru {__version__}")
        return
    gc.set_threshold(200_000)  # torch makes a million lasting objects while loading: looking through them costs 0.2 s
    try:
        from peru_cli.cli import run
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left half done", file=sys.stderr)
        sys.exit(130)
    sys.exit(run())


if __name__ == "__main__":
    main()
