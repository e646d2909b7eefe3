"""The manifest of an adapter folder: methods, base, progress of the training, and the digest of every file."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_lightning.checkpoint.files import sha256_file, write_atomically
from lora_lightning.errors import CheckpointError
from lora_lightning.texts.saved_tokenizer import why_not_plain

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_BYTES = 16 * 1024 * 1024
DIGEST_KEY = "manifest_sha256"
LIBRARIES = ("lora-lightning", "torch", "lightning", "transformers")

FORMATS = ("peft", "lora_lightning", "merged")

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the folder.

    Args:
        sha256: Digest of its bytes, 64 hexadecimal digits.
        num_bytes: Its length.
    """

    sha256: str
    num_bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Measure a file."""
        return cls(sha256=sha256_file(path), num_bytes=path.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know before loading an adapter folder; all values are plain JSON types.

    Args:
        adapter_format: `peft` (PEFT reads it too), `lora_lightning` (what PEFT cannot express), or `merged` (a whole
            model, with its adapter folded in).
        methods: Each attached method as `{"class_path": ..., "init_args": {...}}`.
        base: Name or folder of the base model, or None if there is none.
        base_fingerprint: Digest of the base weights under the adapters; None if the folder was computed from others
            and no base was at hand to digest.
        data_fingerprint: Digest of the training data, or None if the data module has none.
        tokenizer_fingerprint: Digest of the vocabulary of the data's tokenizer, or None without one.
        tokenizer: The data's tokenizer as the training used it, see `SavedTokenizer`; None without one.
        task: Import path of the task's class, or None outside a task.
        label_names: Class names in the order of their ids, or None.
        metrics: Last logged value of each metric.
        epoch: Epochs finished, counted from 0 as Lightning does.
        step: Optimizer steps taken.
        files: Every other file of the folder by its name.
        checkpoint: The `.ckpt` that the folder belongs to or was merged from, or None without one.
        derived: How the adapter was computed from others (`combine`, `shrink`), with its errors, or None.
        versions: Versions of the libraries that wrote it.
        format_version: Version of this format.
    """

    adapter_format: str
    methods: list[dict[str, Any]]
    base: str | None
    base_fingerprint: str | None
    data_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    tokenizer: dict[str, Any] | None = None
    task: str | None = None
    label_names: list[str] | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    files: dict[str, FileRecord] = field(default_factory=dict)
    checkpoint: FileRecord | None = None
    derived: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the manifest as JSON text, keys sorted, with the digest of its other entries."""
        data = plain(self)
        return _text({**data, DIGEST_KEY: _digest(data)})

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_NAME) -> Manifest:
        """Parse and check JSON text.

        Args:
            text: The JSON text.
            source: Where it came from, for messages.

        Raises:
            CheckpointError: It is not JSON, not a manifest of a version that this library reads, or damaged.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{source} is not valid JSON ({error}); it is damaged, use another folder."
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{source} must hold a JSON object, got {type(data).__name__}; use another folder.")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{source} has format version {version!r}, and this library reads {FORMAT_VERSION}; "
                "load it with the version of lora_lightning that wrote it."
            )
        digest = data.pop(DIGEST_KEY, None)  # not there in manifests of older versions
        _check_fields(data, source)
        if digest is not None and digest != _digest(data):
            raise CheckpointError(
                f"{source} differs from what was written ({DIGEST_KEY} does not fit the rest): it was damaged or "
                "changed; use another folder."
            )
        files = {name: FileRecord(**record) for name, record in data["files"].items()}
        checkpoint = data.get("checkpoint")
        return cls(**{**data, "files": files, "checkpoint": checkpoint and FileRecord(**checkpoint)})


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(data).encode(errors="surrogatepass")).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into a folder, atomically; write it after every file that it names."""
    write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an adapter folder.

    Raises:
        CheckpointError: The folder or its manifest is missing, or the manifest cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory; name the adapter folder that stands beside a checkpoint.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST_NAME}, so it is incomplete or was not written by lora_lightning; "
            "name the adapter folder that stands beside a checkpoint."
        )
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_BYTES} bytes, which no manifest is; use another folder.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not valid UTF-8 ({error}); the folder is damaged, use another.") from error
    return Manifest.from_json(text, str(path))


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file of a folder with its manifest.

    Raises:
        CheckpointError: A file is missing, or its length or digest differs.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its manifest names; use another checkpoint.")
        difference = difference_from(record, path)
        if difference is not None:
            raise CheckpointError(f"{path} {difference}; use another checkpoint.")


def difference_from(record: FileRecord, path: Path, found: FileRecord | None = None) -> str | None:
    """Describe how a file differs from its record, as the end of a sentence; None if it does not.

    Args:
        record: The file's record in the manifest.
        path: The file.
        found: The actual record, if the caller knows it; None reads the file, unless its length already differs.
    """
    size = path.stat().st_size if found is None else found.num_bytes
    if size != record.num_bytes:
        return f"has {size} bytes, its manifest says {record.num_bytes}: it was cut short or changed"
    digest = sha256_file(path) if found is None else found.sha256
    if digest != record.sha256:
        return "differs from what was written (SHA-256 mismatch): it was damaged or changed"
    return None


def library_versions() -> dict[str, str]:
    """Return the versions of the packages that affect how an adapter is read."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def class_config(instance: object) -> dict[str, Any]:
    """Describe a dataclass instance, such as a method, as `{"class_path": ..., "init_args": {...}}` in plain types."""
    assert dataclasses.is_dataclass(instance)
    cls = type(instance)
    arguments = {spec.name: getattr(instance, spec.name) for spec in dataclasses.fields(instance) if spec.init}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": plain(arguments)}


def plain(value: Any) -> Any:  # noqa: ANN401 - any value in, JSON types out
    """Convert a value into plain JSON types: non-finite numbers become None, unknown objects their `str`.

    Example:
        >>> plain({"axes": (1, 2), "path": Path("a") / "b", "loss": float("nan")})
        {'axes': [1, 2], 'path': 'a/b', 'loss': None}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name)) for spec in dataclasses.fields(value)}
    return value.as_posix() if isinstance(value, Path) else str(value)


def _is_label_list(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_metrics(value: object) -> bool:
    return isinstance(value, dict) and all(item is None or _is_number(item) for item in value.values())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def _is_optional_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_tokenizer(value: object) -> bool:
    return value is None or why_not_plain(value) is None


def _is_methods(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(method, dict)
            and set(method) == {"class_path", "init_args"}
            and isinstance(method["class_path"], str)
            and isinstance(method["init_args"], dict)
            for method in value
        )
    )


def _is_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        bool(_FILE_NAME.fullmatch(name)) and _is_record(record)  # a plain name: no path can leave the folder
        for name, record in value.items()
    )


def _is_record(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"sha256", "num_bytes"}
        and _is_digest(value["sha256"])
        and _is_count(value["num_bytes"])
    )


def _is_versions(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(version, str) for version in value.values())


# Field -> what it must be, in words for the message, and the test for it.
_FIELDS: dict[str, tuple[str, Any]] = {
    "adapter_format": (f"one of {', '.join(FORMATS)}", lambda value: value in FORMATS),
    "methods": ("a list of {class_path, init_args}", _is_methods),
    "base": ("a text or null", _is_optional_text),
    "base_fingerprint": ("64 hexadecimal digits or null", lambda value: value is None or _is_digest(value)),
    "data_fingerprint": ("a text or null", _is_optional_text),
    "tokenizer_fingerprint": ("64 hexadecimal digits or null", lambda value: value is None or _is_digest(value)),
    "tokenizer": ("a tokenizer as this library keeps it, or null", _is_tokenizer),
    "task": ("a text or null", _is_optional_text),
    "label_names": ("a list of texts or null", _is_label_list),
    "metrics": ("an object of numbers", _is_metrics),
    "epoch": ("a whole number from 0", _is_count),
    "step": ("a whole number from 0", _is_count),
    "files": ("an object of plain file names with sha256 and num_bytes", _is_files),
    "checkpoint": ("sha256 and num_bytes, or null", lambda value: value is None or _is_record(value)),
    "derived": ("an object or null", lambda value: value is None or isinstance(value, dict)),
    "versions": ("an object of texts", _is_versions),
    "format_version": ("a whole number from 0", _is_count),
}


# Manifests of older versions have none of these.
_NEWER = {"checkpoint", "derived", "tokenizer", "tokenizer_fingerprint"}


def _check_fields(data: dict[str, Any], source: str) -> None:
    missing, unknown = sorted(_FIELDS.keys() - _NEWER - data.keys()), sorted(data.keys() - _FIELDS.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source} is not a manifest of this library: missing {missing or 'nothing'}, "
            f"unknown {unknown or 'nothing'}; use another folder."
        )
    for name, (expected, is_valid) in _FIELDS.items():
        if not is_valid(data.get(name)):
            raise CheckpointError(f"{source}: {name} must be {expected}, got {data[name]!r:.80}; use another folder.")
