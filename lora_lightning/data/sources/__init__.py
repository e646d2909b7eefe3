"""Reader of all kinds of sources: records in plain types with their locations."""

from lora_lightning.data.sources.hub import is_hub_name
from lora_lightning.data.sources.mixture import Part, is_mixture, parts_of
from lora_lightning.data.sources.read import (
    describe,
    download,
    is_in_memory,
    read_records,
    source_files,
    source_fingerprint,
)
from lora_lightning.data.sources.record import OnBad, ReadSettings, Record, Source

__all__ = [
    "OnBad",
    "Part",
    "ReadSettings",
    "Record",
    "Source",
    "describe",
    "download",
    "is_hub_name",
    "is_in_memory",
    "is_mixture",
    "parts_of",
    "read_records",
    "source_files",
    "source_fingerprint",
]
