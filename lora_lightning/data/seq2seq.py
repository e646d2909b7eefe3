"""Pairs of a source and a target text, for models with an encoder and a decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lora_lightning.data.column_data import ColumnData
from lora_lightning.data.model_facts import model_facts
from lora_lightning.data.rows.cells import text_of
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, Source
from lora_lightning.data.tokenizers import padding_tokenizer, tell_too_long
from lora_lightning.errors import ConfigError

__all__ = ["Seq2SeqData"]


class Seq2SeqData(ColumnData):
    """Reads pairs of texts for `Seq2SeqLM`; see `RecordData` for sources and splits.

    Copies of a pair in `train` are dropped, and pairs with the same source text stay in one split.

    Batches hold `input_ids` and `attention_mask` `[batch, source length]` and `labels` `[batch, target length]`, which
    end with the tokenizer's end token and are -100 where padded; both are padded on the right.

    Args:
        source_column: Column with the source texts.
        target_column: Column with the target texts.
        prefix: Prefix of every source, such as `"summarize: "`, as in the training of T5.
        max_length: Maximum number of tokens of a source.
        max_target_length: Maximum number of tokens of a target.
        batch_size: Rows in a training batch, on each device.
        **settings: Those of `RecordData`; `too_long` is `cut` or `drop`.

    Attributes:
        counts: As in `RecordData`; of the pairs encoded also `cut`, with `sources_cut` and `targets_cut`, or `dropped`.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = Seq2SeqData("news.jsonl", source_column="article", target_column="summary", prefix="summarize: ")
    """

    inputs = ("source_column",)
    targets = ("target_column",)
    lengths_allowed = ("cut", "drop")

    def __init__(
        self,
        train: Source | None = None,
        *,
        source_column: str = "source",
        target_column: str = "target",
        prefix: str = "",
        max_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 16,
        **settings: Any,  # noqa: ANN401 - those of RecordData
    ) -> None:
        super().__init__(train, max_length=max_length, batch_size=batch_size, **settings)
        self.source_column = source_column
        self.target_column = target_column
        self.prefix = prefix
        self.max_target_length = max_target_length
        self._require_at_least(max_target_length=2)

    def row_of(self, record: Record, split: str) -> Row:
        """Return source and target; a source to predict may be empty.

        Raises:
            DataError: One of them is missing.
        """
        if kind_of(split) == "predict":
            source = self._text_to_predict(record, "source_column")
            return Row([source, ""], source)
        source, target = (self._needed_text(record, setting) for setting in ("source_column", "target_column"))
        return Row([source, target], " ".join(source.split()).casefold())

    def _needed_text(self, record: Record, setting: str) -> str:
        cell = self._cell(record, setting)
        if cell.is_missing:
            way_out = f"where: [\"{cell.column} != ''\"]"
            raise cell.refuse(f"expected a text. Leave such rows out by a condition: {way_out}.")
        return text_of(cell)

    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return a tokenizer that can pad, and check the maximum lengths against the model."""
        # Models with relative positions, such as T5, take longer texts than their tokenizers say.
        most = model_facts(self._backbone() or name).context
        for setting in ("max_length", "max_target_length"):
            length = getattr(self, setting)
            if most is not None and length > most:
                raise ConfigError(
                    f"{setting} is {length}, but {name} takes at most {most} tokens; set it to that or less."
                )
        return padding_tokenizer(name, max_length=1)

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Tokenize pairs."""
        is_predicted = kind_of(split) == "predict"
        sources = self._tokenize(self.max_length, [self.prefix + row.content[0] for row in rows])
        targets: list[tuple[list[int], bool]] = [([], False)] * len(rows)
        if not is_predicted:
            targets = self._tokenize(self.max_target_length, text_target=[row.content[1] for row in rows])
        for index, ((source, is_source_cut), (target, is_target_cut)) in enumerate(zip(sources, targets, strict=True)):
            is_long = is_source_cut or is_target_cut
            if is_long and self.too_long == "drop" and not is_predicted:
                counts["dropped"] += 1
                continue
            counts.update(cut=is_long, sources_cut=is_source_cut, targets_cut=is_target_cut)
            labels = {} if is_predicted else {"labels": self._ended(target)}
            # Without special tokens an empty text has no tokens at all, and no model takes that.
            yield {"row": index, "input_ids": source or [self.tokenizer.pad_token_id], **labels}

    def _tokenize(self, most: int, *texts: Any, **settings: Any) -> list[tuple[list[int], bool]]:  # noqa: ANN401 - what tokenizers take
        """Return the token ids of each text, and whether it was cut."""
        encoded = self.tokenizer(*texts, **settings, truncation=True, max_length=most)
        # A slow tokenizer does not tell what it cuts.
        cut = [bool(one.overflowing) for one in encoded.encodings or ()] or [False] * len(encoded["input_ids"])
        return list(zip(encoded["input_ids"], cut, strict=True))

    def _ended(self, ids: list[int]) -> list[int]:
        """Return target tokens followed by the end token."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids[: self.max_target_length - 1], end]

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of texts that are too long."""
        whose = f"{split} pairs of {self.plan.source_name(split)}"
        if lost.get("cut"):
            whose += f" ({lost['sources_cut']} sources, {lost['targets_cut']} targets)"
        lengths = f"{self.max_length} (source) or {self.max_target_length} (target)"
        tell_too_long(lost, len(self._rows(split)), whose, lengths, "max_length or max_target_length")
