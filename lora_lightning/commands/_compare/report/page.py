"""The comparison as Markdown and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lora_lightning import page
from lora_lightning.checkpoint.manifest import library_versions
from lora_lightning.commands._compare.report.charts import COSTS
from lora_lightning.commands._compare.report.table import Column, Row, cell, to_markdown
from lora_lightning.commands._compare.study import Study

_STYLE = """
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid currentColor; }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.notes { white-space: normal; min-width: 18rem; }
tr.end td { font-style: italic; }
"""
_SORT = """<script>
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
</script>"""
_TEXTS = ("method", "size", "principle", "suits", "difficulty", "notes", "merges", "steps_to_reach")
_CAPTIONS = {
    **{cost.name: f"Test metric against {cost.title}" for cost in COSTS},
    "learning_curves": "Learning curves of the full runs (first seed)",
}


def markdown(
    study: Study, rows: Sequence[Row], columns: Sequence[Column], command: str, pictures: Sequence[str]
) -> str:
    """Return the comparison as Markdown: the table, the notes, and its settings."""
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
    """Return the comparison as one self-contained HTML page."""
    head = "".join(
        f'<th scope="col"{_text(column)}><button type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    body = "\n".join(_table_row(row, columns) for row in rows)
    details = "".join(f"<li>{escape(line)}</li>" for line in _details(study))
    parts = [
        f"<p>{escape(_intro(study))}</p>",
        '<p class="soft">Click a heading to sort by it.</p>',
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>',
        *(page.section(_CAPTIONS[name], page.picture(_CAPTIONS[name], picture)) for name, picture in pictures.items()),
        page.section("How this was made", page.verbatim(command), f"<ul>{details}</ul>"),
        _SORT,
    ]
    return page.page(_title(study), parts, _STYLE)


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
