"""A report as one self-contained HTML page: tables, plots as inline SVG, and the results of gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peru_cli.shown import html as escape

Table = tuple[str, list[str], list[list[str]]]  # title, columns (`>X` aligns right), rows

_STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #667085; --line: #e3e6eb; --accent: #3b6ea5; --bad: #b42318; --good: #18794e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 12px; }
.soft, figcaption { color: var(--soft); }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); border-bottom-width: 2px; }
tr:last-child td { border-bottom: 0; }
th.right, td.right { text-align: right; }
td.right span { color: var(--soft); font-size: 12px; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { font-size: 13px; margin-top: 6px; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
details summary { cursor: pointer; font-weight: 600; } details[open] summary { margin-bottom: 12px; }
"""


def _cell(text: str, right: bool) -> str:
    """A table cell. An interval in brackets is set in small type."""
    number, bracket, interval = text.partition(" [")
    shown = escape(number) + (f" <span>[{escape(interval)}</span>" if bracket else "")
    return f'<td class="right">{shown}</td>' if right else f"<td>{escape(text)}</td>"


def _table(table: Table) -> str:
    title, columns, rows = table
    right = [column.startswith(">") for column in columns]
    head = "".join(f'<th class="right">{escape(c[1:])}</th>' if r else f"<th>{escape(c)}</th>" for c, r in zip(columns, right, strict=True))
    body = "".join("<tr>" + "".join(_cell(t, r) for t, r in zip(row, right, strict=True)) + "</tr>" for row in rows)
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{heading}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_report(
    path: Path, title: str, command: str, tables: Sequence[Table], folded: Sequence[Table], plots: Sequence[tuple[str, str]],
    gates: Sequence[str], missed: Sequence[str], notes: Sequence[str],
) -> None:  # fmt: skip
    """Write the page.

    Args:
        command: the command line.
        tables: shown; `folded`: shown on a click (long ones).
        plots: captions and SVG elements.
        gates: what was demanded; `missed`: a line for each failure.
        notes: sentences under the tables."""
    parts = [f"<h1>{escape(title)}</h1>", f'<div class="soft"><code>{escape(command)}</code></div>']
    if gates:
        verdict = f'<span class="bad">{len(missed)} missed</span>' if missed else '<span class="good">all reached</span>'
        lines = "".join(f'<li class="bad">{escape(line)}</li>' for line in missed)
        parts.append(f'<section><h2>Gates: <span class="verdict">{verdict}</span></h2><code>{escape(" ".join(gates))}</code>'
                     f"{f'<ul>{lines}</ul>' if lines else ''}</section>")  # fmt: skip
    parts += [f"<section>{_table(table)}</section>" for table in tables]
    if notes:
        parts.append(f'<p class="soft">{"<br>".join(escape(note) for note in notes)}</p>')
    parts += [f"<section><figure>{svg}<figcaption>{escape(caption)}</figcaption></figure></section>" for caption, svg in plots]
    for table in folded:
        parts.append(f"<section><details><summary>{escape(table[0])}</summary>{_table(('', *table[1:]))}</details></section>")
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    page += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
    path.write_text(f"{page}<body><main>{''.join(parts)}</main></body></html>\n", "utf-8")
