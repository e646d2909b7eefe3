import bz2
import gzip
import lzma

import pytest

from lora_lightning.data.sources import ReadSettings, read_records

SUFFIXES = ["", ".gz", ".bz2", ".xz", ".zst"]


def read(source, role="train", *, share=(0, 1), **settings):
    """The records of a source, as a list."""
    return list(read_records(source, ReadSettings(**settings), role, share=share))


def fields_of(source, role="train", **settings):
    """The fields of each record."""
    source = str(source) if hasattr(source, "parts") else source
    return [dict(record.fields) for record in read(source, role, **settings)]


def tolerant(source, **settings):
    """The records, the messages and the texts of broken records where these are skipped."""
    bad = []
    found = read_records(source, ReadSettings(**settings), on_bad=lambda error, text: bad.append((str(error), text)))
    records = list(found)
    return records, [message for message, _ in bad], [text for _, text in bad]


def compress(content, suffix):
    """Compress bytes as the suffix of a file says."""
    if suffix == ".zst":
        import pyarrow

        return pyarrow.Codec("zstd").compress(content, asbytes=True)
    known = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return known[suffix](content)


@pytest.fixture
def write(tmp_path):
    """Write a file; its path comes back as text."""

    def _write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return _write
