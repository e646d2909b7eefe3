"""Manifests survive the round trip through JSON, and whatever is wrong with one is said in a sentence."""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    check_files,
    class_config,
    library_versions,
    plain,
    read_manifest,
    write_manifest,
)
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        adapter_format="peft",
        methods=[class_config(LoRA(r=3, target_modules=["query"], rank_pattern={"x": 1}))],
        base="some/model",
        base_fingerprint="0" * 64,
        label_names=["böse", "gut"],
        metrics={"val/loss": 0.5, "val/f1": None},
        epoch=1,
        step=20,
        files={"a.safetensors": FileRecord(sha256="f" * 64, num_bytes=3)},
    )


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def test_round_trip(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert is_plain(json.loads((tmp_path / MANIFEST_NAME).read_text()))
    assert {"torch", "transformers", "lightning"} <= manifest.versions.keys()


def test_not_finite_metrics_become_null(manifest: Manifest) -> None:
    manifest.metrics["train/loss"] = math.inf
    assert json.loads(manifest.to_json())["metrics"] == {"train/loss": None, "val/f1": None, "val/loss": 0.5}


def test_plain() -> None:
    class Color(Enum):
        RED = "red"

    value = {1: (Color.RED, {3, 2}), "dtype": torch.float32, "method": LoRA(r=2), "ok": True}
    result = plain(value)
    assert is_plain(result)
    assert (result["1"], result["dtype"], result["ok"]) == (["red", [2, 3]], "torch.float32", True)
    assert result["method"]["r"] == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter_format", "zip"),
        ("methods", []),
        ("methods", [{"class_path": "x"}]),
        ("base", 3),
        ("base_fingerprint", "abc"),
        ("label_names", [1, 2]),
        ("tokenizer_fingerprint", "abc"),
        ("metrics", {"loss": "low"}),
        ("epoch", -1),
        ("step", True),
        ("files", {"../escape": {"sha256": "f" * 64, "num_bytes": 1}}),
        ("files", {"/etc/passwd": {"sha256": "f" * 64, "num_bytes": 1}}),
        ("files", {"a": {"sha256": "f" * 63, "num_bytes": 1}}),
        ("files", {"a": {"sha256": "f" * 64}}),
        ("versions", {"torch": 2}),
        ("checkpoint", {"sha256": "f" * 64}),
    ],
)
def test_bad_values_are_named(manifest: Manifest, field: str, value: Any) -> None:
    data = json.loads(manifest.to_json())
    Manifest.from_json(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"x.json: {field} must be"):
        Manifest.from_json(json.dumps({**data, field: value}), "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"format_version": 9}', "format version 9, and this library reads 1"),
        ('{"format_version": 1, "surprise": 2}', r"missing \['adapter_format'.*unknown \['surprise'\]"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(text)


def test_a_manifest_notices_any_change_of_itself(manifest: Manifest) -> None:
    data = json.loads(manifest.to_json())
    assert Manifest.from_json(json.dumps(data)) == manifest
    with pytest.raises(CheckpointError, match=r"x\.json differs from what was written"):
        Manifest.from_json(json.dumps({**data, "step": data["step"] + 1}), "x.json")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Manifest.from_json("[" * 100_000)


def test_a_manifest_of_an_older_version_has_neither_digest_nor_checkpoint_nor_tokenizer(manifest: Manifest) -> None:
    data = json.loads(manifest.to_json())
    del data["manifest_sha256"], data["checkpoint"], data["tokenizer_fingerprint"]
    assert Manifest.from_json(json.dumps(data)) == manifest


def test_read_manifest_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not valid UTF-8"):
        read_manifest(tmp_path)
    monkeypatch.setattr("lora_lightning.checkpoint.manifest.MAX_BYTES", 1)
    with pytest.raises(CheckpointError, match="larger than 1 bytes"):
        read_manifest(tmp_path)


def test_check_files(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    manifest.files.clear()
    manifest.files["weights"] = FileRecord.of(path)
    check_files(tmp_path, manifest)
    path.write_bytes(b"abd")
    with pytest.raises(CheckpointError, match="SHA-256 mismatch"):
        check_files(tmp_path, manifest)
    path.write_bytes(b"ab")
    with pytest.raises(CheckpointError, match="has 2 bytes, its manifest says 3"):
        check_files(tmp_path, manifest)
    path.unlink()
    with pytest.raises(CheckpointError, match="lacks weights"):
        check_files(tmp_path, manifest)


def test_a_library_that_is_not_installed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lightning.checkpoint.manifest.LIBRARIES", ("torch", "no-such-library"))
    versions = library_versions()
    assert versions["no-such-library"] == "unknown"
    assert versions["torch"] == torch.__version__
