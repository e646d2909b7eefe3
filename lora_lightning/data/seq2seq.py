"""Pairs of a source and a target text, for models with an encoder and a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.batching import EncodedRows, PadToLongest
from lora_lightning.data.conditions import missing, parse_condition
from lora_lightning.data.model_facts import model_facts
from lora_lightning.data.rows import text_of
from lora_lightning.data.table_data import TableData, TableSplits, usual_sizes
from lora_lightning.data.tables import Table, TableReader
from lora_lightning.data.tokenizers import padding_tokenizer
from lora_lightning.errors import ConfigError, DataError

_TOKENIZED_TOGETHER = 1000


@dataclass(frozen=True)
class TextPair:
    """A text and what is to be made of it.

    Args:
        source: The text.
        target: What is to be made of it; empty where nobody knows.
    """

    source: str
    target: str = ""

    @property
    def group(self) -> str:
        """The source text, which stays on one side of a split."""
        return " ".join(self.source.split()).casefold()

    @property
    def content(self) -> list[Any]:
        """All that the pair says."""
        return [self.source, self.target]


class Seq2SeqData(TableData[TextPair]):
    """Reads pairs of texts, divides them, tokenizes them once, and makes batches for `Seq2SeqLM`.

    A source is a `.csv`, `.tsv`, `.jsonl` (`.ndjson`, `.json`) or `.parquet` file, either inside an installed package
    (`pkg://package/file`), or the name of a Hub data set. Copies of a pair in `train` are dropped, and pairs with the
    same source text stay on one side of a split.

    Batches hold `input_ids` and `attention_mask` `[batch, source length]` and `labels` `[batch, target length]`, which
    end with the tokenizer's end token and are -100 where padded; both are padded on the right.

    Args:
        train: Where the training pairs are, and those to split off.
        val: Where the validation pairs are; None splits them off `train`.
        test: Where the test pairs are; None splits them off `train`.
        predict: Where the texts to answer are (no targets needed); None answers those of the test pairs.
        source_column: Column with the source texts.
        target_column: Column with the target texts.
        prefix: Text put in front of every source, such as `"summarize: "`, as T5 was trained with.
        encoding: Encoding of the files.
        separator: Separator of a `.csv` or `.tsv` file; None means a comma and a tab.
        subset: Configuration of a Hub data set that has several.
        where: Conditions that every row of `train`, `val` and `test` must meet, such as `summary != ''`.
        max_length: Tokens after which a source is cut.
        max_target_length: Tokens after which a target is cut.
        batch_size: Rows in a training batch, on each device.
        eval_batch_size: Rows in any other batch; None means `batch_size`.
        train_size: Number (int) or share (float) of the pairs to train on; None means all that the others leave.
        val_size: Number or share to validate on, where no file is given; None means 0.1, and 0 none.
        test_size: Number or share to test on, where no file is given; None means 0.1, and 0 none.
        group_by_length: Put sources of like length into a batch, so that little is padded.
        seed: Seed of the split and of the order of training, at least 0.
        num_workers: Processes that make batches; 0 makes them in the main one, which is fast enough for texts.
        tokenizer: Hub name, folder, or `pkg://package/folder` of the tokenizer; None means the backbone's own.

    Attributes:
        rows: The pairs of the splits (`train`, `val`, `test`, `predict`), in the order of their file.
        counts: See `TableData`; of the pairs encoded also `sources_cut` and `targets_cut`.
        fingerprint: SHA-256 of the pairs and their splits.
        tokenizer: The tokenizer, once `setup` has run.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = Seq2SeqData("news.jsonl", source_column="article", target_column="summary", prefix="summarize: ")
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        encoding: str = "utf-8",
        separator: str | None = None,
        subset: str | None = None,
        where: list[str] | None = None,
        max_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        group_by_length: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        sources = {"train": train, "val": val, "test": test, "predict": predict}
        reader = TableReader(encoding=encoding, separator=separator, subset=subset)
        super().__init__(
            TableSplits(
                sources=sources,
                sizes=usual_sizes(sources, {"train": train_size, "val": val_size, "test": test_size}),
                seed=seed,
                read_table=reader.read,
                rows_from=self._pairs_from,
                conditions=tuple(map(parse_condition, where or [])),
            ),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            group_by_length=group_by_length,
            seed=seed,
            num_workers=num_workers,
            tokenizer=tokenizer,
        )
        self.save_hyperparameters(logger=False)
        self.source_column, self.target_column, self.prefix = source_column, target_column, prefix
        self.max_length, self.max_target_length = max_length, max_target_length
        self._require_at_least(max_length=1, max_target_length=2)
        self._encoded_by: tuple[str, str | None] | None = None

    def _pairs_from(self, table: Table, with_target: bool) -> list[TextPair]:
        sources = _texts(table, self.source_column, "source_column", needed=with_target)
        if not with_target:
            return [TextPair(source) for source in sources]
        targets = _texts(table, self.target_column, "target_column", needed=True)
        return [TextPair(source, target) for source, target in zip(sources, targets, strict=True)]

    def _prepare(self) -> None:
        backbone, name = getattr(self._module(), "backbone", None), self._name_of_tokenizer()
        if self._encoded_by == (name, backbone):
            return
        # Models with relative positions, such as T5, take longer texts than their tokenizers say.
        most = model_facts(backbone if isinstance(backbone, str) else name).context
        for setting, length in (("max_length", self.max_length), ("max_target_length", self.max_target_length)):
            if most is not None and length > most:
                raise ConfigError(
                    f"{setting} is {length}, but {name} takes at most {most} tokens; set it to that or less."
                )
        self.tokenizer = padding_tokenizer(name, max_length=1)
        self._encoded_by = (name, backbone)
        self._encoded.clear()

    def _encode(self, split: str) -> EncodedRows:
        """Tokenize pairs; tell how many are cut."""
        pairs, pad = self.rows[split], self.tokenizer.pad_token_id
        encodings: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        labels: list[list[int]] = []
        cut = {"sources_cut": 0, "targets_cut": 0}
        for start in range(0, len(pairs), _TOKENIZED_TOGETHER):
            part = pairs[start : start + _TOKENIZED_TOGETHER]
            ids, num_cut = self._tokenize(self.max_length, [self.prefix + pair.source for pair in part])
            # Without special tokens an empty text has no tokens at all, and no model takes that.
            encodings["input_ids"] += [tokens or [pad] for tokens in ids]
            encodings["attention_mask"] += [[1] * max(len(tokens), 1) for tokens in ids]
            cut["sources_cut"] += num_cut
            if split != "predict":
                ids, num_cut = self._tokenize(self.max_target_length, text_target=[pair.target for pair in part])
                labels += map(self._ended, ids)
                cut["targets_cut"] += num_cut
        if split == "predict" and self._splits.sources["predict"] is None:
            return EncodedRows(encodings, None)  # the test pairs, told of already
        self.counts.update({name: self.counts.get(name, 0) + count for name, count in cut.items()})
        if any(cut.values()):
            rank_zero_warn(
                f"Of {len(pairs)} {split} pairs of {self._splits.sources[split] or self._splits.sources['train']}, "
                f"{cut['sources_cut']} sources are longer than {self.max_length} tokens and {cut['targets_cut']} "
                f"targets longer than {self.max_target_length}, and were cut. Set a larger max_length or "
                "max_target_length to keep them whole."
            )
        return EncodedRows(encodings, labels or None)

    def _tokenize(self, most: int, *texts: Any, **settings: Any) -> tuple[list[list[int]], int]:  # noqa: ANN401 - what tokenizers take
        """Return the token ids of texts, and how many were cut."""
        encoded = self.tokenizer(*texts, **settings, truncation=True, max_length=most)
        # A slow tokenizer does not tell what it cuts.
        return encoded["input_ids"], sum(bool(one.overflowing) for one in encoded.encodings or ())

    def _ended(self, ids: list[int]) -> list[int]:
        """Return target tokens with the end token behind them."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids[: self.max_target_length - 1], end]

    def _collate(self) -> PadToLongest:
        return PadToLongest({"input_ids": self.tokenizer.pad_token_id})


def _texts(table: Table, column: str, setting: str, *, needed: bool) -> list[str]:
    """Return the texts of a column; empty ones are refused, or are empty texts where they are not needed."""
    cells = table.column(column, setting)
    blank = missing(cells)
    if needed and blank.any():
        first = cells.index[blank.to_numpy(dtype=bool)][0] + 1
        raise DataError(
            f"{table.source}: {int(blank.sum())} of {len(cells)} rows have nothing in the column {column!r}, the first "
            f"is row {first}. Leave them out by a condition: where: [\"{column} != ''\"]."
        )
    pairs = zip(cells.tolist(), blank.tolist(), strict=True)
    return ["" if gone else text_of(cell, table.source, column) for cell, gone in pairs]
