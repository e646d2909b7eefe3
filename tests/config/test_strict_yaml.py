import math

import pytest
import yaml

from lora_lightning.config.strict_yaml import MAX_BYTES, MAX_DEPTH, check_yaml, load_text, read_document
from lora_lightning.errors import ConfigError


def test_lines_of_keys():
    text = "a: 1\nb:\n  c:\n    - x\n    - d: 2\n"
    assert check_yaml(text, "f") == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", "0"): 4,
        ("b", "c", "1"): 5,
        ("b", "c", "1", "d"): 5,
    }


def test_numbers_dates_and_plain_tags():
    assert load_text("{a: 1e-3, b: 2E5, c: .5, d: 7, e: 2020-01-01, f: !!str 3, g: yes, h: .inf}") == {
        "a": 1e-3,
        "b": 2e5,
        "c": 0.5,
        "d": 7,
        "e": "2020-01-01",
        "f": "3",
        "g": True,
        "h": math.inf,
    }


def test_anchors_and_merge_keys_work():
    text = "base: &base {r: 8, alpha: 16}\nmine: {<<: *base, r: 4}\nagain: *base\n"
    assert load_text(text)["mine"] == {"r": 4, "alpha": 16}
    assert load_text(text)["again"] == {"r": 8, "alpha": 16}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "f, line 3: the key `a` is there twice (first in line 1)"),
        ("x:\n  - {a: 1, a: 2}\n", "f, line 2: the key `a` is there twice"),
        ('a: 1\n"a": 2\n', "twice"),
        ("a: !!python/name:os.system\n", "the tag `!!python/name:os.system` is not allowed"),
        ("a: !!python/object/apply:os.system [ls]\n", "f, line 1: the tag"),
        ("!!set {a, b}\n", "the tag `!!set` is not allowed"),
        ("a: !!binary abc\n", "the tag `!!binary`"),
        ("a: &x [*x]\n", "contains itself"),
        ("a: *x\n", "comes before its anchor"),
        ("a: 1\n---\nb: 2\n", "f, line 2: a second document"),
        ("? [a, b]\n: 1\n", "a key must be a single word"),
        ("a: 'open\n", "f, line 2: not valid YAML"),
        ("a: b: c\n", "f, line 1: not valid YAML"),
        ("\ta: 1\n", "not valid YAML"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper"),
        ("[" * 200_000, "nested deeper"),
    ],
)
def test_refused(text, words):
    with pytest.raises(ConfigError) as error:
        check_yaml(text, "f")
    assert words in str(error.value)
    with pytest.raises(yaml.YAMLError):
        load_text(text)


def test_the_deepest_that_is_allowed():
    assert check_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f")


def test_alias_bomb():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 8)]
    with pytest.raises(ConfigError, match="once its aliases are written out"):
        check_yaml("\n".join(levels), "f")
    check_yaml("\n".join(levels[:3]), "f")


def test_read_document(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("﻿a:\n  b: 1\n", encoding="utf-8")  # with the mark that some editors put first
    document = read_document(path)
    assert document.data == {"a": {"b": 1}}
    assert document.lines[("a", "b")] == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got nothing"),
        (b"# only a comment\n", "got nothing"),
        (b"- a\n", "got a list"),
        (b"word\n", "got a str"),
        (b"\xff\xfea: 1", "not a text file in UTF-8 (byte 0)"),
        (b"a: \x00\n", "not valid YAML"),
        (b"#" * (MAX_BYTES + 1), "more than 1 MiB"),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_document(path)
    assert words in str(error.value)
    assert "a.yaml" in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="no YAML file is in"):
        read_document(tmp_path / "a.yaml")
    for name in ("lora.yaml", "dora.yml", "other.txt"):
        (tmp_path / name).write_text("a: 1")
    with pytest.raises(ConfigError, match=r"nearest there: \S*lora.yaml, \S*dora.yml$"):
        read_document(tmp_path / "lara.yaml")
    with pytest.raises(ConfigError, match=r"nearest there: \S*dora.yml, \S*lora.yaml$"):
        read_document(tmp_path / "zzzzzzzzzzzzz")
    with pytest.raises(ConfigError, match="does not exist either"):
        read_document(tmp_path / "gone" / "a.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_document(tmp_path)
