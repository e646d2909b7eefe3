"""Pairs of a source and a target text, for models with an encoder and a decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.model_facts import model_facts
from lora_lightning.data.record_data import RecordData
from lora_lightning.data.rows.cells import cell_of, text_of
from lora_lightning.data.rows.conditions import is_missing
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import padding_tokenizer
from lora_lightning.errors import ConfigError, DataError


class Seq2SeqData(RecordData):
    """Reads pairs of texts for `Seq2SeqLM`; see `RecordData` for sources and splits.

    Copies of a pair in `train` are dropped, and pairs with the same source text stay in one split.

    Batches hold `input_ids` and `attention_mask` `[batch, source length]` and `labels` `[batch, target length]`, which
    end with the tokenizer's end token and are -100 where padded; both are padded on the right.

    Args:
        train: See `RecordData`.
        source_column: Column with the source texts.
        target_column: Column with the target texts.
        prefix: Text put in front of every source, such as `"summarize: "`, as T5 was trained with.
        max_length: Tokens after which a source is too long.
        max_target_length: Tokens after which a target is too long.
        batch_size: Rows in a training batch, on each device.
        **settings: See `RecordData`; `too_long` is `cut` or `drop`.

    Attributes:
        counts: See `RecordData`; of the pairs encoded also `sources_cut` and `targets_cut`, or `dropped`.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = Seq2SeqData("news.jsonl", source_column="article", target_column="summary", prefix="summarize: ")
    """

    lengths_allowed = ("cut", "drop")

    def __init__(
        self,
        train: Source,
        *,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        max_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 16,
        **settings: Any,  # noqa: ANN401 - those of RecordData
    ) -> None:
        super().__init__(train, batch_size=batch_size, **settings)
        self.source_column, self.target_column, self.prefix = source_column, target_column, prefix
        self.max_length, self.max_target_length = max_length, max_target_length
        self._require_at_least(max_length=1, max_target_length=2)

    def columns_read(self, split: str) -> dict[str, str]:
        """Return the columns of sources and targets; rows to predict need no targets."""
        columns = {self.source_column: "source_column"}
        return columns if split == "predict" else {**columns, self.target_column: "target_column"}

    def row_of(self, record: Record, split: str) -> Row:
        """Return source and target; a source to predict may be empty.

        Raises:
            DataError: One of them is missing.
        """
        if split == "predict":
            cell = record.fields.get(self.source_column)
            source = "" if is_missing(cell) else text_of(cell, record.place, self.source_column)
            return Row([source, ""], source)
        source = self._needed(record, self.source_column, "source_column")
        target = self._needed(record, self.target_column, "target_column")
        return Row([source, target], " ".join(source.split()).casefold())

    def _needed(self, record: Record, column: str, setting: str) -> str:
        cell = cell_of(record, column, setting)
        if is_missing(cell):
            raise DataError(
                f"{record.place}: there is nothing in the column {column!r}. Leave such rows out by a condition: "
                f"where: [\"{column} != ''\"]."
            )
        return text_of(cell, record.place, column)

    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return a tokenizer that can pad, after a look at the lengths that the model takes."""
        # Models with relative positions, such as T5, take longer texts than their tokenizers say.
        most = model_facts(self._backbone() or name).context
        for setting, length in (("max_length", self.max_length), ("max_target_length", self.max_target_length)):
            if most is not None and length > most:
                raise ConfigError(
                    f"{setting} is {length}, but {name} takes at most {most} tokens; set it to that or less."
                )
        return padding_tokenizer(name, max_length=1)

    def encoding_key(self) -> list[Any]:
        """Return the prefix, the lengths, and what becomes of longer texts."""
        return [self.prefix, self.max_length, self.max_target_length, self.too_long]

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> dict[str, list[Any]]:
        """Tokenize pairs."""
        is_predicted = split == "predict"
        sources = self._tokenize(self.max_length, [self.prefix + row.content[0] for row in rows])
        targets = None
        if not is_predicted:
            targets = self._tokenize(self.max_target_length, text_target=[row.content[1] for row in rows])
        columns: dict[str, list[Any]] = {"input_ids": [], "row": []}
        for row, (ids, is_cut) in enumerate(sources):
            target, is_target_cut = targets[row] if targets else ([], False)
            if self.too_long == "drop" and not is_predicted and (is_cut or is_target_cut):
                counts["dropped"] += 1
                continue
            counts.update(sources_cut=int(is_cut), targets_cut=int(is_target_cut))
            # Without special tokens an empty text has no tokens at all, and no model takes that.
            columns["input_ids"].append(ids or [self.tokenizer.pad_token_id])
            columns["row"].append(row)
            if targets:
                columns.setdefault("labels", []).append(self._ended(target))
        return columns

    def _tokenize(self, most: int, *texts: Any, **settings: Any) -> list[tuple[list[int], bool]]:  # noqa: ANN401 - what tokenizers take
        """Return the token ids of each text, and whether it was cut."""
        encoded = self.tokenizer(*texts, **settings, truncation=True, max_length=most)
        # A slow tokenizer does not tell what it cuts.
        cut = [bool(one.overflowing) for one in encoded.encodings or ()] or [False] * len(encoded["input_ids"])
        return list(zip(encoded["input_ids"], cut, strict=True))

    def _ended(self, ids: list[int]) -> list[int]:
        """Return target tokens with the end token behind them."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids[: self.max_target_length - 1], end]

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of texts that are too long."""
        whose = f"{len(self._rows(split))} {split} pairs of {self.plan.source_name(split)}"
        if lost.get("dropped"):
            rank_zero_warn(
                f"Of {whose}, {lost['dropped']} are longer than {self.max_length} tokens (source) or "
                f"{self.max_target_length} (target) and were left out."
            )
        elif lost.get("sources_cut") or lost.get("targets_cut"):
            rank_zero_warn(
                f"Of {whose}, {lost['sources_cut']} sources are longer than {self.max_length} tokens and "
                f"{lost['targets_cut']} targets longer than {self.max_target_length}, and were cut. Set a larger "
                "max_length or max_target_length to keep them whole."
            )

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return source and target."""
        return content[0], content[1]

    def _collate(self) -> PadToLongest:
        return PadToLongest({"input_ids": self.tokenizer.pad_token_id})
