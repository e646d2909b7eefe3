"""The script of docs/existing_module.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.callbacks.runs import LIGHTNING_WARNINGS

pytestmark = LIGHTNING_WARNINGS
PAGE = Path(__file__).parents[2] / "docs" / "existing_module.md"
MARK = "<!-- This block is run by tests/finetuning/test_docs.py. -->"


def test_the_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.match(r"\s*```python\n(.*?)```", PAGE.read_text().split(MARK)[1], re.DOTALL).group(1)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    x = names["x"]
    merged, loaded = names["plain"], names["module"]
    assert torch.allclose(merged.backbone(x), loaded.backbone(x), atol=1e-5)
    assert not torch.allclose(merged.backbone(x), names["Classifier"]().backbone(x), atol=1e-3)
    state = torch.load(names["path"], weights_only=True)["state_dict"]
    assert "backbone.0.lora_A" in state
    assert "backbone.0.weight" not in state
