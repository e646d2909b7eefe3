"""Text files, plain or compressed, line by line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora_lightning.errors import DataError


def _open_zstd(path: Path, mode: str) -> Any:  # noqa: ANN401, ARG001 - called as the openers of the standard library
    import pyarrow as pa

    stream: Any = pa.input_stream(str(path), compression="zstd")
    return io.BufferedReader(stream, 1 << 20)  # Arrow's streams have no lines


_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
COMPRESSED = tuple(_OPENERS)
_MARKS_OF_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# What reading a damaged file raises, by the library that reads it.
_DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error)


def kind_of_file(path: Path) -> str:
    """Return the suffix of a file's format, without that of its compression.

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
        opener = _OPENERS.get(path.suffix.lower(), Path.open)
        with opener(path, "rb") as file:
            yield file
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{name} cannot be read: {reason}. Check that the file is whole.") from error


class Undecoded(str):
    """A line that cannot be decoded, with replacement characters for invalid bytes, and its error."""

    error: DataError


def checked(lines: Iterable[str]) -> Iterator[str]:
    """Return lines, and refuse one that cannot be decoded.

    Raises:
        DataError: There is one.
    """
    for line in lines:
        if isinstance(line, Undecoded):
            raise line.error
        yield line


def text_lines(path: Path, name: str, encoding: str) -> Iterator[str]:
    """Return the lines of a text file with their ends, decoded while reading, without a byte order mark.

    A line that cannot be decoded is `Undecoded`, if lines can be separated without decoding.

    Raises:
        DataError: The encoding is unknown, or is not the file's; the message suggests others.
    """
    try:
        "a".encode(encoding)  # also refuses what is an encoding, but none of texts, such as hex
    except LookupError:
        raise DataError(f"encoding {encoding!r} is unknown; try utf-8, latin-1, cp1252 or utf-16.") from None
    with open_bytes(path, name) as file:
        yield from _decoded(file, name, encoding)


def _decoded(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    first = file.readline()
    if not is_wide and first.startswith(_MARKS_OF_UTF_16):
        raise _not_encoded(name, encoding, 0, 1, "utf-16")
    start = first.removeprefix(codecs.BOM_UTF8)
    decoder = codecs.getincrementaldecoder(encoding)()
    position, number, rest = len(first) - len(start), 1, ""
    # Pieces end with a byte 10, which in a wide encoding may be half of a character. An empty one ends the file.
    for piece in itertools.chain([start], file, [b""]):
        try:
            text = rest + decoder.decode(piece, final=not piece)
        except UnicodeError as error:
            undecoded, _ = decoder.getstate()
            wrong = position - len(undecoded) + getattr(error, "start", 0)
            others = "utf-8" if is_wide else "latin-1, cp1252"
            failure = _not_encoded(name, encoding, wrong, number, others)
            if is_wide:
                raise failure from error
            decoder.reset()
            yield _undecoded(rest + (undecoded + piece).decode(encoding, "replace"), failure)
            position, number, rest = position + len(piece), number + 1, ""
            continue
        position += len(piece)
        *lines, rest = text.split("\n")
        for line in lines:
            yield f"{line}\n".removeprefix("\ufeff" if number == 1 else "")
            number += 1
    if rest:
        yield rest


def _undecoded(line: str, error: DataError) -> Undecoded:
    found = Undecoded(line)
    found.error = error
    return found


def _not_encoded(name: str, encoding: str, byte: int, line: int, others: str) -> DataError:
    return DataError(
        f"{name} is not {encoding} (byte {byte}, line {line}): set encoding to the file's own; try {others}."
    )
