"""Rows of one or several documents, which do not attend to each other, and their batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.batches.columns import EncodedRows
from lora_lightning.data.batches.mixing import Mixture
from lora_lightning.data.language.encoding import Encoded
from lora_lightning.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

UNSUPERVISED = -100


class Document(NamedTuple):
    """The tokens of one document.

    Args:
        ids: Token ids `[length]`.
        labels: The same ids where they are to be learnt, else -100 `[length]`. The first is never learnt.
    """

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]


def document_from(encoded: Encoded) -> Document:
    """Return an encoded sample as a document.

    Example:
        >>> document_from(Encoded([5, 6, 7], [True, False, True])).labels.tolist()
        [-100, -100, 7]
    """
    ids = np.asarray(encoded.ids, dtype=np.int32)
    trained = np.asarray(encoded.trained, dtype=bool)
    # In a packed row the token before belongs to another document.
    trained[:1] = False
    return Document(ids, np.where(trained, ids, UNSUPERVISED).astype(np.int32))


class DocumentRows(Dataset[list[Document]]):
    """Documents, one or several in a row.

    Args:
        documents: The documents: columns `input_ids` and `labels`.
        max_length: Pack documents into rows of at most so many tokens; None gives each a row of its own.
        seed: Seed of the order in which documents are packed.
        mixture: Draws the documents that are packed by weight, once for all epochs; None packs each once.

    Attributes:
        documents: The documents.
        lengths: Number of tokens of each row.
    """

    def __init__(
        self,
        documents: EncodedRows,
        *,
        max_length: int | None = None,
        seed: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        self.documents = documents
        self.lengths = documents.lengths
        self._rows: list[list[int]] | None = None
        if max_length is not None:
            generator = np.random.default_rng(seed)
            drawn = mixture.draw(generator) if mixture else np.arange(len(documents))
            order = generator.permutation(drawn)
            packs = first_fit(documents.lengths[order].tolist(), max_length)
            self._rows = [order[pack].tolist() for pack in packs]
            self.lengths = np.array([documents.lengths[row].sum() for row in self._rows])

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Document]:
        """Return the documents of a row."""
        members = [index] if self._rows is None else self._rows[index]
        found = [self.documents[member] for member in members]
        return [Document(one["input_ids"], one["labels"]) for one in found]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each size, in turn, into the first bin that has room for it.

    Args:
        sizes: The sizes, each at most `capacity`.
        capacity: How much a bin holds.

    Returns:
        For each bin the indices of its sizes.

    Example:
        >>> first_fit([5, 6, 3, 4, 2], capacity=8)
        [[0, 2], [1, 4], [3]]
    """
    # A tree over the bins' room: each node holds the most room below it, so that a search takes log(bins) steps.
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for place, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(place)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def pack_stream(documents: Iterable[Document], capacity: int, open_rows: int = 64) -> Iterator[list[Document]]:
    """Pack documents as they arrive into the first open row that has room; if none has, yield the fullest row.

    Args:
        documents: The documents, each of at most `capacity` tokens.
        capacity: Tokens in a row.
        open_rows: How many rows are filled at a time.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        size = len(document.ids)
        place = next((place for place, free in enumerate(room) if free >= size), None)
        if place is None:
            if len(rows) == open_rows:
                fullest = room.index(min(room))
                room.pop(fullest)
                yield rows.pop(fullest)
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(document)
        room[place] -= size
    yield from rows


@dataclass(frozen=True)
class DocumentBatch:
    """Makes a batch of rows of documents, padded to the longest row.

    Rows of one document get an `attention_mask` for padding and, with padding on the left, `position_ids` that count
    from the first token. Packed rows get no mask but `position_ids` that restart at 0 in each document; each padding
    token counts as one document. From these positions, the models of transformers build a block-diagonal mask for every
    kind of attention layer. They do so only without a key-value cache: call them with `use_cache=False`, as `CausalLM`
    does.

    Args:
        pad_id: The token that pads.
        side: `right` or `left`, where the padding goes.
        packed: Whether rows may hold several documents.
        positions: Whether the model takes `position_ids`, where rows are not packed.
    """

    pad_id: int
    side: str = "right"
    packed: bool = False
    positions: bool = True

    def __call__(self, rows: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` and the tensors described above, `[batch, tokens]` each.

        Raises:
            DataError: No token of the batch is to be learnt.
        """
        width = max(sum(len(document.ids) for document in row) for row in rows)
        batch = {
            "input_ids": self._padded([[document.ids for document in row] for row in rows], width, self.pad_id),
            "labels": self._padded([[document.labels for document in row] for row in rows], width, UNSUPERVISED),
        }
        if not (batch["labels"] != UNSUPERVISED).any():
            raise DataError(
                f"All labels of a batch of {len(rows)} rows are masked, so there is nothing to learn from it; leave "
                "these rows out, or set train_on to all."
            )
        positions = [[np.arange(len(document.ids)) for document in row] for row in rows]
        if not self.packed:
            ones = [[np.ones(len(document.ids)) for document in row] for row in rows]
            batch["attention_mask"] = self._padded(ones, width, 0)
        if self.packed or (self.side == "left" and self.positions):
            batch["position_ids"] = self._padded(positions, width, 0)
        return batch

    def _padded(self, rows: Sequence[Sequence[npt.NDArray[np.generic]]], width: int, value: int) -> Tensor:
        padded = torch.full((len(rows), width), value, dtype=torch.long)
        for target, parts in zip(padded, rows, strict=True):
            whole = torch.from_numpy(np.concatenate(parts).astype(np.int64))
            target[slice(len(whole)) if self.side == "right" else slice(width - len(whole), width)] = whole
        return padded
