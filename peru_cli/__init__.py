"""peru: store many fine-tunes of one base model for little more than the price of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from peru_cli.jobs.live import apply as apply
    from peru_cli.jobs.live import open_artifact as open_artifact

__all__ = ["__version__", "apply", "open_artifact"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `peru --version` must not wait for torch.
    if name in ("apply", "open_artifact"):
        from peru_cli.jobs import live

        return getattr(live, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
