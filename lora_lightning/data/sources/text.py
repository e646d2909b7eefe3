"""Text files, plain or compressed, line by line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora_lightning.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What reading a damaged file raises, by the library that reads it.
_DAMAGE = (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error, OSError)


def kind_of_file(path: Path) -> str:
    """Return the suffix that tells what a file holds, without that of its compression.

    Example:
        >>> kind_of_file(Path("a/train.CSV.gz")), kind_of_file(Path("train.jsonl"))
        ('.csv', '.jsonl')
    """
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


@contextmanager
def open_bytes(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file, and decompress it as it is read.

    Raises:
        DataError: It cannot be read, or is damaged.
    """
    try:
        with _opened(path) as file:
            yield file
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{name} cannot be read: {reason}. Check that the file is whole.") from error


def text_lines(path: Path, name: str, encoding: str) -> Iterator[str]:
    """Return the lines of a text file with their ends, decoded as they are read; a byte order mark is left out.

    Raises:
        DataError: The encoding is unknown, or is not the file's; those to try stand in the message.
    """
    try:
        "a".encode(encoding)  # also refuses what is an encoding, but none of texts, such as hex
        is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    except LookupError:
        raise DataError(f"encoding {encoding!r} is unknown; try utf-8, latin-1, cp1252 or utf-16.") from None
    with open_bytes(path, name) as file:
        yield from _wide_lines(file, name, encoding) if is_wide else _lines(file, name, encoding)


def _lines(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    passed = 0
    for number, raw in enumerate(file, start=1):
        if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise _not_encoded(name, encoding, 0, 1, "utf-16")
        line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
        try:
            yield line.decode(encoding)
        except UnicodeError as error:
            place = passed + getattr(error, "start", 0)
            raise _not_encoded(name, encoding, place, number, "latin-1, cp1252") from error
        passed += len(raw)


def _wide_lines(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    """Return lines of an encoding in which a line end is more than one byte."""
    decoder = codecs.getincrementaldecoder(encoding)()
    read, passed, number, rest = 0, 0, 1, ""
    try:
        for raw in file:  # parts that end with a byte 10, which may be half of a character
            *lines, rest = (rest + decoder.decode(raw)).split("\n")
            for line in lines:
                yield f"{line}\n".removeprefix("\ufeff" if number == 1 else "")
                number += 1
            read += len(raw)
            passed = read - len(decoder.getstate()[0])
        rest += decoder.decode(b"", final=True)
    except UnicodeError as error:
        place = passed + getattr(error, "start", 0)
        raise _not_encoded(name, encoding, place, number, "utf-8") from error
    if rest:
        yield rest


def _not_encoded(name: str, encoding: str, place: int, line: int, others: str) -> DataError:
    return DataError(
        f"{name} is not {encoding} (byte {place}, line {line}): set encoding to the file's own; try {others}."
    )


def _opened(path: Path) -> Any:  # noqa: ANN401 - each library has a class of its own
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        stream: Any = pa.input_stream(str(path), compression="zstd")
        return io.BufferedReader(stream, 1 << 20)  # Arrow's streams know no lines
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[suffix](path, "rb") if suffix in openers else path.open("rb")
