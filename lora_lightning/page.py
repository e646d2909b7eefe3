"""The parts of HTML pages that need nothing beside themselves: style, tables, pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from string import Template

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1c1e21; --ground: #fff; --line: #d5d8dc; --head: #f1f3f5; --soft: #5f6670; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --ground: #16181b; --line: #363a40; --head: #22252a; --soft: #9aa1ab; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground); margin: 2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { white-space: pre-wrap; background: var(--head); padding: .7rem; border-radius: 6px; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); vertical-align: bottom; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--ground); font-weight: 600; }
th:first-child { background: var(--head); }
.text { text-align: left; white-space: pre-wrap; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .5rem 0; }
.soft { color: var(--soft); }
$style
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a page.

    Args:
        title: Title, as plain text.
        parts: HTML of its parts, in order.
        style: CSS beside the common one.

    Example:
        >>> "<h1>A &amp; B</h1>" in page("A & B", ["<p>text</p>"])
        True
    """
    return _PAGE.substitute(title=escape(title), body="\n".join(parts), style=style)


def section(title: str, *parts: str) -> str:
    """Return a heading, as plain text, and the HTML below it."""
    return "\n".join([f"<h2>{escape(title)}</h2>", *parts])


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, is_text: bool = False) -> str:
    """Return a table of plain values.

    Args:
        head: Names of the columns.
        rows: Values of each row.
        is_text: Whether the cells hold texts, which are aligned left and keep their line breaks.

    Example:
        >>> "<td>1 &lt; 2</td>" in table(["x"], [["1 < 2"]])
        True
    """
    kind = ' class="text"' if is_text else ""
    names = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name in head)
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind}>{escape(str(value))}</td>" for value in row)
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{names}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def picture(caption: str, png: bytes) -> str:
    """Return a PNG picture, held by the page itself."""
    return f'<img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def verbatim(text: str) -> str:
    """Return text as it stands, in a font of equal widths."""
    return f"<pre>{escape(text)}</pre>"
