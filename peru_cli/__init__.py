"""peru: store many fine-tunes of one base model for little more than the price of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peru_cli.version import __version__

if TYPE_CHECKING:
    from peru_cli.export.diff import Updates as Updates
    from peru_cli.export.diff import diff as diff
    from peru_cli.export.patches import Patch as Patch
    from peru_cli.export.patches import patches as patches
    from peru_cli.live.apply import apply as apply
    from peru_cli.live.apply import open_artifact as open_artifact

__all__ = ["Patch", "Updates", "__version__", "apply", "diff", "open_artifact", "patches"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `peru --version` must not wait for torch.
    if name in ("apply", "open_artifact"):
        from peru_cli.live import apply as live

        return getattr(live, name)
    if name in ("diff", "Updates"):
        from peru_cli.export import diff as differences

        return getattr(differences, name)
    if name in ("patches", "Patch"):
        from peru_cli.export import patches as exported

        return getattr(exported, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
