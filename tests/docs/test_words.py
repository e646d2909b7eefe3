"""The documentation is written in plain technical English, and the package has no more old phrases than it had."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS

ROOT = DOCS.parent


def load_script():
    spec = importlib.util.spec_from_file_location("words_script", ROOT / "scripts" / "words.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look up the module of their annotations
    spec.loader.exec_module(script)
    return script


WORDS = load_script()


def found(text):
    return [(hit.line, hit.phrase) for hit in WORDS.hits_in(text, Path("page.md"))]


def test_phrases_are_found_across_lines_and_in_their_forms():
    assert found("The run\ngoes\non, and nobody is told.") == [(2, "goes on"), (3, "nobody"), (3, "is told")]
    assert found("It is no folder.") == [(1, "is no")]


@pytest.mark.parametrize(
    "text", ["The run resumes.", "It is no longer needed.", "They go only after it.", "It is not a folder."]
)
def test_other_texts_are_left_alone(text):
    assert found(text) == []


def test_there_are_no_new_ones():
    assert WORDS.new_hits(ROOT) == []


def test_the_documentation_has_none():
    assert [folder for folder in WORDS.baseline(ROOT) if not folder.startswith("lora_lightning/")] == []


def test_a_new_phrase_is_named_with_its_file(tmp_path):
    package = tmp_path / "lora_lightning" / "data"
    package.mkdir(parents=True)
    (package / "a.py").write_text(
        '"""Nobody."""\n# nobody reads comments\ndef f():\n    raise ValueError(f"{1} goes on")\n'
    )
    (tmp_path / "scripts").mkdir()
    (tmp_path / "README.md").write_text("A page.\n")
    (tmp_path / "scripts" / "words.json").write_text(json.dumps({"lora_lightning/data": 2}))
    assert WORDS.new_hits(tmp_path) == []
    (tmp_path / "scripts" / "words.json").write_text(json.dumps({"lora_lightning/data": 1}))
    assert WORDS.new_hits(tmp_path) == [
        "lora_lightning/data has 2 phrases, and may have 1:",
        "  lora_lightning/data/a.py:1: 'Nobody': say what is not known or not read",
        "  lora_lightning/data/a.py:4: 'goes on': continue, resume",
    ]
