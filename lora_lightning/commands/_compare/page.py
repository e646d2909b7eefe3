"""The comparison as Markdown and as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from string import Template

from lora_lightning.checkpoint.manifest import library_versions
from lora_lightning.commands._compare.charts import COSTS
from lora_lightning.commands._compare.study import Study
from lora_lightning.commands._compare.table import Column, Row, cell, to_markdown

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
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); vertical-align: bottom; } th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid currentColor; }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.text, th.text { text-align: left; } td.notes { white-space: normal; min-width: 18rem; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--ground); font-weight: 600; }
th:first-child { background: var(--head); }
tr.end td { font-style: italic; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .5rem 0; }
.soft { color: var(--soft); }
</style>
</head>
<body>
<h1>$title</h1>
<p>$intro</p>
<p class="soft">Click a heading to sort by it.</p>
<div class="wide"><table>
<thead><tr>$head</tr></thead>
<tbody>
$body
</tbody>
</table></div>
$charts
<h2>How this was made</h2>
$details
<script>
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentElement, place = head.cellIndex, body = document.querySelector("tbody");
    var down = head.getAttribute("aria-sort") === "ascending";
    document.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    var rows = Array.from(body.rows);
    rows.sort(function (one, other) {
      var a = one.cells[place].dataset.value, b = other.cells[place].dataset.value;
      if (a === "" || b === "") { return (a === "") - (b === ""); }
      var x = Number(a), y = Number(b);
      var order = isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y;
      return down ? -order : order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
  });
});
</script>
</body>
</html>
""")
_TEXTS = ("method", "size", "principle", "suits", "difficulty", "notes", "merges", "steps_to_reach")
_CAPTIONS = {
    **{cost.name: f"Test metric against {cost.title}" for cost in COSTS},
    "learning_curves": "Learning curves of the full runs (first seed)",
}


def markdown(
    study: Study, rows: Sequence[Row], columns: Sequence[Column], command: str, pictures: Sequence[str]
) -> str:
    """Return the comparison as Markdown: the table, the notes, and how it was made."""
    notes = [f"- {row.label}: {'; '.join(row.notes)}." for row in rows if row.notes]
    shown = [column for column in columns if column.key != "notes"]
    parts = [
        f"# {_title(study)}",
        _intro(study),
        to_markdown(rows, shown).rstrip(),
        *(["## Notes", "\n".join(notes)] if notes else []),
        *(["## Charts", "\n\n".join(f"![{_CAPTIONS[name]}]({name}.png)" for name in pictures)] if pictures else []),
        "## How this was made",
        f"```\n{command}\n```",
        "\n".join(f"- {line}" for line in _details(study)),
    ]
    return "\n\n".join(parts) + "\n"


def html(
    study: Study, rows: Sequence[Row], columns: Sequence[Column], command: str, pictures: Mapping[str, bytes]
) -> str:
    """Return the comparison as one HTML page with everything inside."""
    head = "".join(
        f'<th scope="col"{_text(column)}><button type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    body = "\n".join(_table_row(row, columns) for row in rows)
    charts = "\n".join(
        f'<h2>{escape(_CAPTIONS[name])}</h2>\n<img alt="{escape(_CAPTIONS[name])}" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    details = "".join(f"<li>{escape(line)}</li>" for line in _details(study))
    return _PAGE.substitute(
        title=escape(_title(study)),
        intro=escape(_intro(study)),
        head=head,
        body=body,
        charts=charts,
        details=f"<pre>{escape(command)}</pre>\n<ul>{details}</ul>",
    )


def _table_row(row: Row, columns: Sequence[Column]) -> str:
    cells = []
    for column in columns:
        value = "; ".join(row.notes) if column.key == "notes" else row.values.get(column.key)
        plain = "" if value is None else escape(str(value), quote=True)
        cells.append(f'<td{_text(column)} data-value="{plain}">{escape(cell(row, column))}</td>')
    kind = "" if row.kind == "method" else ' class="end"'
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _text(column: Column) -> str:
    if column.key not in _TEXTS:
        return ""
    return ' class="text notes"' if column.key == "notes" else ' class="text"'


def _title(study: Study) -> str:
    task = study.task["class_path"].rpartition(".")[2]
    return f"Methods compared: {task} on {study.task['init_args'].get('backbone') or 'a model of its own'}"


def _intro(study: Study) -> str:
    seeds = ", ".join(map(str, study.seeds))
    return (
        f"Budget: {study.budget}. Seeds: {seeds}. Each method's learning rate had the lowest validation loss after "
        f"{study.search_steps} steps with each of its rates (search.csv); every head learns at {study.head_lr:g}. The "
        "test split was read once, after the last step."
    )


def _details(study: Study) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return [
        f"Budget: {study.budget}.",
        "Trainable parameters and their share of the base do not count the head, which every row trains alike.",
        "Peak memory is that of the trial's own process while it trains (on a GPU: what was allocated there); kept for "
        "backward are the tensors of one training batch, each storage once, parameters not counted.",
        "Time a step is the median over the steps; inference is the time of a forward pass relative to the bare base, "
        "in rounds by turns.",
        f"Settings of every trial: {study.folder.name}/study.json; results: {study.folder.name}/trials.",
        f"Versions: {versions}.",
    ]
