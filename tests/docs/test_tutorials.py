"""The code of every tutorial runs, in order, in an empty folder, and leaves what the tutorial says."""

import pytest

from tests.docs.pages import DOCS, run_page

TUTORIALS = DOCS / "tutorials"
RUN = "runs/version_0"
LEFT = {
    "classify_csv": [
        f"{RUN}/report.html",
        f"{RUN}/checkpoints/last/manifest.json",
        "answers.csv",
        "merged/config.json",
    ],
    "dialogue_4bit": [f"{RUN}/checkpoints/last.ckpt", "adapter/adapter_config.json"],
    "own_module": ["merged.ckpt"],
    "own_method": [f"{RUN}/checkpoints/last.ckpt", "merged/config.json"],
    "which_method": ["comparison/comparison.html", "comparison/comparison.csv"],
    "many_gpus": ["two/version_0/checkpoints/last.ckpt", "continued/version_0/metrics.csv", "merged/config.json"],
    "many_adapters": ["mood/adapter_config.json"],
}
PRINTED = {
    "classify_csv": ["set encoding", "status 2", "predicted_label", "'score'"],
    "dialogue_4bit": ["learned:", "with the adapter"],
    "own_module": ["head.weight", "0.016"],
    "own_method": ["32 of", "test/accuracy"],
    "which_method": ["frozen + head", "full fine-tuning"],
    "many_gpus": ["in 2 processes", "in 1 process"],
    "many_adapters": ["mixed batch: [0, 0, 1, 1]", "('mood', 'question', 'mood-2')", "('question',)"],
}
"""What a reader would look for in the output."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_every_tutorial_is_run():
    assert {path.stem for path in TUTORIALS.glob("*.md")} == LEFT.keys() == PRINTED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT)
def test_a_tutorial_runs(name, tmp_path, cache):
    printed = run_page((TUTORIALS / f"{name}.md").read_text(encoding="utf-8"), tmp_path, cache)
    assert [path for path in LEFT[name] if not (tmp_path / path).exists()] == []
    assert [text for text in PRINTED[name] if text not in printed] == []
