"""Samples of a file that is larger than memory: read, encoded and packed while the model trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lora_lightning.data.conversations import sample_from
from lora_lightning.data.encoding import Encoder
from lora_lightning.data.packing import Document, document_from, pack_stream
from lora_lightning.data.records import read_records
from lora_lightning.errors import DataError


@dataclass(eq=False)
class StreamedRows(IterableDataset[list[Document]]):
    """Rows of documents, in the order of the file but for a buffer in which they are shuffled.

    Worker processes share the lines. Every rank reads them all and takes its turn of the rows that come out, so that
    all ranks get the same number of rows, and none waits for another at the end; up to `num_replicas - 1` rows of each
    worker are left out for that.

    Args:
        source: The file, or a folder of files.
        encoder: Encodes the samples.
        columns: For our names of fields, the names that the file has instead.
        packing: Whether documents are packed into rows of the encoder's `max_length` tokens.
        buffer: Number of rows in the buffer; 1 keeps the order of the file.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This process's rank.
        epoch: The epoch that the next iteration is for; every epoch has an order of its own.
    """

    source: str
    encoder: Encoder
    columns: Mapping[str, str] = field(default_factory=dict)
    packing: bool = False
    buffer: int = 1000
    seed: int = 0
    num_replicas: int = 1
    rank: int = 0
    epoch: int = 0

    def __iter__(self) -> Iterator[list[Document]]:
        """Return the rows of this rank and worker."""
        worker = get_worker_info()
        part = (worker.id, worker.num_workers) if worker else (0, 1)
        order = np.random.default_rng([self.seed, self.epoch, self.rank, part[0]])
        return self._shuffled(self._dealt(*part), order)

    def documents(self, worker: int = 0, num_workers: int = 1, *, warn: bool = True) -> Iterator[Document]:
        """Return the documents of one worker's share of the lines; `warn` at the end of what is lost.

        Raises:
            DataError: A line is malformed, or no line can be learnt from.
        """
        became: Counter[str] = Counter()
        records = read_records(self.source, wanted=lambda place: place % num_workers == worker)
        for record in records:
            became["read"] += 1
            sample = sample_from(record, self.columns)
            encoded = self.encoder.encode(sample) if sample is not None else None
            became["cut"] += bool(encoded and encoded.cut)
            if encoded is None or not encoded.num_trained:
                became["dropped"] += 1
                continue
            yield document_from(encoded)
        if became["read"] and became["dropped"] == became["read"]:
            raise DataError(
                f"{self.source}: nothing can be learnt from any of {became['read']} rows: their answers are blank, or "
                f"beyond the first {self.encoder.max_length} tokens. Set a larger max_length."
            )
        if warn and (became["cut"] or became["dropped"]):
            rank_zero_warn(
                f"{self.source}: of {became['read']} rows, {became['cut']} were cut at {self.encoder.max_length} "
                f"tokens, and {became['dropped']} were left out because no answer was left of them."
            )

    def _dealt(self, worker: int, num_workers: int) -> Iterator[list[Document]]:
        """Return this rank's turn of the rows, as many as every other rank gets."""
        documents = self.documents(worker, num_workers)
        rows = pack_stream(documents, self.encoder.max_length) if self.packing else ([one] for one in documents)
        mine: list[Document] = []
        for place, row in enumerate(rows):
            turn = place % self.num_replicas
            if turn == self.rank:
                mine = row
            if turn == self.num_replicas - 1:
                yield mine

    def _shuffled(self, rows: Iterator[list[Document]], order: np.random.Generator) -> Iterator[list[Document]]:
        held: list[list[Document]] = []
        for row in rows:
            held.append(row)
            if len(held) >= self.buffer:
                place = int(order.integers(len(held)))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()
        yield from (held[place] for place in order.permutation(len(held)).tolist())


class StreamLoader(DataLoader[Any]):
    """A loader of `StreamedRows` that begins a new epoch with every iteration, and tells mistakes in one sentence."""

    dataset: StreamedRows

    def __iter__(self) -> Any:  # noqa: ANN401 - torch's iterator class is private
        """Return the batches of the next epoch."""
        batches = super().__iter__()
        self.dataset.epoch += 1
        return self._told(batches)

    def _told(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except DataError as error:
            # From a worker process, torch brings the message with the whole traceback around it.
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from None
