"""The page of a run: what it holds, and that nothing in it is read from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import lightning as L
import pytest

from lora_lightning.callbacks import MetricCurve, RunReport
from lora_lightning.callbacks.run_report import _samples
from lora_lightning.tasks.tables import Table
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask, fit, make_trainer

pytestmark = LIGHTNING_WARNINGS


class Page(HTMLParser):
    """Collects headings, cells and the addresses of what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("h1", "h2"):
            self.headings.append(data)
        if self._tag == "td":
            self.cells.append(data)


class TabledTask(LineTask):
    """Has a table with names that HTML must not take for tags."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.evaluation_table = Table("Counts", ["<b>", "b"], ["<i>", "j"], [[5, 6], [7, 8]])


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_what_the_page_holds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MetricCurve(), RunReport())
    trainer.fit(TabledTask(), LineData())
    page = page_of(tmp_path / "run" / "version_0")
    assert page.headings[1:] == ["Metrics", "Last validation: Counts", "Curves"]
    assert {"val/loss", f"{float(trainer.callback_metrics['val/loss']):.5g}", "<i>", "5", "8"} <= {*page.cells}
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)


def test_without_a_table_there_is_none(tmp_path: Path) -> None:
    fit(tmp_path, RunReport())
    assert page_of(tmp_path / "run" / "version_0").headings[1:] == ["Metrics"]


def test_a_failed_run_has_its_page(tmp_path: Path) -> None:
    class Breaks(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise IndexError("no such luck")

    with pytest.raises(IndexError):
        fit(tmp_path, RunReport(), Breaks())
    text = (tmp_path / "run" / "version_0" / "report.html").read_text(encoding="utf-8")
    assert "ended by IndexError: no such luck" in text


def test_the_samples_are_those_of_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(
        '{"step": 1, "prompt": "a", "expected": null, "generated": "old"}\n'
        '{"step": 2, "prompt": "a", "expected": null, "generated": "<new>"}\n'
    )
    assert Page(_samples(path)[0]).cells == ["a", "<new>"]
    assert _samples(tmp_path / "none.jsonl") == []
