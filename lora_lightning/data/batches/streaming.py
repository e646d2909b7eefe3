"""Samples of a file that is larger than memory: read, encoded and packed while the model trains."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lora_lightning.data.batches.mixing import interleave
from lora_lightning.data.batches.packing import Document, document_from, pack_stream
from lora_lightning.data.language.conversations import sample_from
from lora_lightning.data.language.encoding import EncodedSample, Encoder
from lora_lightning.data.rows.reports import note
from lora_lightning.data.sources import ReadSettings, Record, Source, describe, parts_of, read_records
from lora_lightning.errors import DataError
from lora_lightning.resume.position import Layout, Passed, Position

_Row = list[Document]
_PassedBefore = tuple[Passed, ...]


@dataclass(eq=False)
class StreamedRows(IterableDataset[list[Document]]):
    """Rows of documents in file order, shuffled within a buffer.

    Worker processes share the lines. Every rank reads all lines and takes every `num_replicas`-th row, so that all
    ranks get the same number of rows and none waits for another at the end. For that, up to `num_replicas - 1` rows of
    each worker are dropped.

    Args:
        source: The files; see `Source`. Those of a mixture are drawn by weight; a file that ends restarts, and an
            epoch ends when each was read once.
        encoder: Encodes the samples.
        settings: How files are read.
        columns: For our names of fields, the names that the file has instead.
        skips_bad_rows: Whether broken rows are left out and counted, instead of ending the run.
        packing: Whether documents are packed into rows of the encoder's `max_length` tokens.
        buffer: Number of rows in the buffer; 1 keeps the order of the file.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This process's rank.
        epoch: The epoch of the next iteration; every epoch has a different order.
        passed: Batches of this epoch that have passed in other layouts (numbers of ranks and workers). The remaining
            rows keep their order and are divided again; each process reads the streams of all former ranks and workers.
        notes: Folder in which each process notes what it drops (see `note`); None for processes that need not, since
            all ranks read the same.
    """

    source: Source
    encoder: Encoder
    settings: ReadSettings = field(default_factory=ReadSettings)
    columns: Mapping[str, str] = field(default_factory=dict)
    skips_bad_rows: bool = False
    packing: bool = False
    buffer: int = 1000
    seed: int = 0
    num_replicas: int = 1
    rank: int = 0
    epoch: int = 0
    passed: _PassedBefore = ()
    notes: Path | None = None
    _first_skipped: DataError | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[_Row]:
        """Return the rows of this rank and worker."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        layout = Layout(self.num_replicas, num_workers=num_workers)
        groups = self._groups(layout, worker, self.epoch, self.passed)
        return self._of_rank(groups, self.rank, worker, self.epoch, is_shuffled=not self.passed)

    def documents(self, worker: int = 0, num_workers: int = 1, epoch: int = 0) -> Iterator[Document]:
        """Return the documents of one worker's share of the lines, and note at the end what was dropped.

        Raises:
            DataError: A line is malformed, or no line can be trained on.
        """
        lost: Counter[str] = Counter(rows_read=0)
        ignored: Counter[str] = Counter()
        has_documents = False
        for record in self._records(worker, num_workers, epoch):
            lost["rows_read"] += 1
            encoded = self._encoded(record, lost, ignored)
            lost.update(cut=int(encoded.cut), answers_lost=encoded.num_lost)
            ignored.update(encoded.ignored)
            has_documents = has_documents or bool(encoded.pieces)
            yield from map(document_from, encoded.pieces)
        # Of several workers, one may have a share of which nothing is left.
        if not has_documents and num_workers == 1:
            raise self._nothing_left(lost["rows_read"])
        note(self.notes, share=[worker, num_workers, epoch], lost=lost, ignored=ignored)

    def _records(self, worker: int, num_workers: int, epoch: int) -> Iterator[Record]:
        """Return one worker's share of the records, those of several sources drawn by weight."""

        def begin(source: Source, is_first: bool) -> Iterator[Record]:
            on_bad = self._skip if is_first else pass_over
            share = (worker, num_workers)
            return read_records(source, self.settings, on_bad=on_bad if self.skips_bad_rows else None, share=share)

        parts = parts_of(self.source)
        # The ranks share the rows that come out, so all of them draw alike.
        generator = np.random.default_rng([self.seed, epoch, worker, num_workers])
        streams = [partial(begin, part.source) for part in parts]
        return interleave(streams, [part.weight for part in parts], generator)

    def _encoded(self, record: Record, lost: Counter[str], ignored: Counter[str]) -> EncodedSample:
        try:
            sample = sample_from(record, self.columns, ignored)
            lost["rows_incomplete"] += sample is None
            return EncodedSample(()) if sample is None else self.encoder.encode(sample)
        except DataError as error:
            if not self.skips_bad_rows:
                raise
            self._skip(error, json.dumps(record.fields, default=str))
            return EncodedSample(())

    def _skip(self, error: DataError, text: str) -> None:
        """Leave out a broken row and note it; warn of the first at once."""
        if self._first_skipped is None:
            rank_zero_warn(f"A broken row is left out: {error}")
            self._first_skipped = error
        note(self.notes, reason=str(error), text=text)

    def _nothing_left(self, num_read: int) -> DataError:
        name = describe(self.source)
        if self._first_skipped is not None:
            return DataError(f"{name}: no row can be used; the first broken one: {self._first_skipped}")
        return DataError(
            f"{name}: nothing can be learnt from any of {num_read} rows: their answers are blank, marked as not to be "
            f"learnt, or beyond the first {self.encoder.max_length} tokens. Set a larger max_length."
        )

    # A group is one row for each rank. Only whole groups are used, so that all ranks get equally many rows.

    def _groups(self, layout: Layout, worker: int, epoch: int, passed: _PassedBefore) -> Iterator[tuple[_Row, ...]]:
        """Return the groups of one worker, of all rows or of the remaining ones."""
        if passed:
            return itertools.islice(
                _in_groups(self._left(epoch, passed), layout.num_replicas), worker, None, layout.num_workers
            )
        documents = self.documents(worker, layout.num_workers, epoch)
        rows = pack_stream(documents, self.encoder.max_length) if self.packing else ([one] for one in documents)
        return _in_groups(rows, layout.num_replicas)

    def _of_rank(
        self, groups: Iterator[tuple[_Row, ...]], rank: int, worker: int, epoch: int, *, is_shuffled: bool
    ) -> Iterator[_Row]:
        rows = (group[rank] for group in groups)
        if not is_shuffled:
            return rows
        return self._shuffled(rows, np.random.default_rng([self.seed, epoch, rank, worker]))

    def _left(self, epoch: int, passed: _PassedBefore) -> Iterator[_Row]:
        """Return the rows that remain after batches have passed: step by step, and in each step rank by rank."""
        *earlier, (num_batches, layout) = passed
        by_worker = [
            itertools.tee(self._groups(layout, worker, epoch, tuple(earlier)), layout.num_replicas)
            for worker in range(layout.num_workers)
        ]
        by_rank = [
            _in_turn(
                [
                    self._of_rank(groups[rank], rank, worker, epoch, is_shuffled=not earlier)
                    for worker, groups in enumerate(by_worker)
                ],
                layout.batch_size,
            )
            for rank in range(layout.num_replicas)
        ]
        for batches in itertools.islice(zip(*by_rank, strict=True), num_batches, None):
            yield from itertools.chain(*batches)

    def _shuffled(self, rows: Iterator[list[Document]], order: np.random.Generator) -> Iterator[list[Document]]:
        held: list[list[Document]] = []
        for row in rows:
            held.append(row)
            if len(held) >= self.buffer:
                place = int(order.integers(len(held)))
                held[place], held[-1] = held[-1], held[place]
                yield held.pop()
        yield from (held[place] for place in order.permutation(len(held)).tolist())


def _in_groups(rows: Iterator[_Row], size: int) -> Iterator[tuple[_Row, ...]]:
    """Return consecutive rows in whole groups; an incomplete group at the end is dropped."""
    return zip(*[rows] * size, strict=False)


def _in_turn(workers: list[Iterator[_Row]], batch_size: int) -> Iterator[list[_Row]]:
    """Return batches in the order in which a loader takes them from its workers: round robin over unfinished ones."""
    while workers:
        for worker in list(workers):
            batch = list(itertools.islice(worker, batch_size))
            if batch:
                yield batch
            else:
                workers.remove(worker)


class StreamLoader(DataLoader[Any]):
    """A loader of `StreamedRows` that starts a new epoch with every iteration and reports data errors in one sentence.

    To start at a later batch of an epoch (see `SeekableLoader`), it reads and encodes the rows before it.
    """

    dataset: StreamedRows
    at_end: Callable[[], None] | None = None
    """Called once, when the first iteration ends or is interrupted."""
    _num_skipped = 0

    @property
    def layout(self) -> Layout:
        """How the rows are divided among ranks and workers."""
        return Layout(self.dataset.num_replicas, self.batch_size or 1, max(self.num_workers, 1))

    def seekable(self) -> bool:
        """Return True: `seek` works."""
        return True

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        passed, self._num_skipped = position.passed, 0
        if passed and passed[-1].layout == self.layout:
            passed, self._num_skipped = passed[:-1], passed[-1].num_batches
        self.dataset.epoch, self.dataset.passed = position.epoch, passed

    def __iter__(self) -> Any:  # noqa: ANN401 - torch's iterator class is private
        """Return the batches of the next epoch."""
        batches = super().__iter__()
        num_skipped, self._num_skipped = self._num_skipped, 0
        self.dataset.epoch, self.dataset.passed = self.dataset.epoch + 1, ()
        return self._told(batches, num_skipped)

    def _told(self, batches: Iterator[Any], num_skipped: int) -> Iterator[Any]:
        try:
            yield from itertools.islice(batches, num_skipped, None)
        except DataError as error:
            # From a worker process, torch brings the message with the whole traceback around it.
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from None
        finally:
            at_end, self.at_end, self.dataset.notes = self.at_end, None, None
            if at_end is not None:
                at_end()


def pass_over(error: DataError, text: str) -> None:
    """Skip a broken row silently; another process reports and counts it."""
