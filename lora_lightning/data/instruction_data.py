"""Conversations, prompts with completions, and plain texts, for causal language models."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.data.base import Batches
from lora_lightning.data.batches.columns import EncodedRows
from lora_lightning.data.batches.mixing import Mixture
from lora_lightning.data.batches.packing import UNSUPERVISED, DocumentBatch, DocumentRows, document_from
from lora_lightning.data.batches.streaming import StreamedRows, StreamLoader
from lora_lightning.data.cache import temporary_folder
from lora_lightning.data.keys import ends_of
from lora_lightning.data.language.conversations import COLUMNS, sample_from, sample_of
from lora_lightning.data.language.encoder_setup import build_encoder
from lora_lightning.data.language.encoding import Encoder
from lora_lightning.data.language.questions import LOOKED_AT_FIRST, QuestionRows
from lora_lightning.data.model_facts import model_facts
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.data.rows.reports import bad_rows_file, noted, write_bad_rows
from lora_lightning.data.rows.row import Example, Row, StoredRow
from lora_lightning.data.sources import Record, Source, describe, is_hub_name, is_in_memory, source_files
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.paths import nearest
from lora_lightning.texts.chat_templates import chat_template

__all__ = ["InstructionData"]

_IGNORED = "ignored: "
_DID = {"cut": "cut", "split": "split", "drop": "dropped"}


class InstructionData(QuestionRows):
    """Reads samples for `CausalLM`; see `RecordData` for sources and splits.

    The fields of a record determine its format: `messages` (role and content), `conversations` (from and value),
    `prompt` and `completion`, `instruction` with `input`, `output` and `history`, or `text`; each may have `system` and
    `tools`. A YAML file holds chatterbot's dialogues.

    The tokenizer's chat template, or the one that `template` names, formats conversations. It also formats prompts and
    completions given as texts; without a template they are concatenated. The model learns the assistant's words and the
    token that ends its turn; of plain texts it learns every token. Each sample ends with a token at which the model
    stops.

    Samples with the same first question stay in one split. Copies of a sample in `train` are dropped. A sample that is
    too long is cut at its end, or dropped if no token of an answer would remain. A warning reports how many.

    Rows to predict need no answer (no `completion`, no `output`, no last turn of the assistant); an existing answer is
    removed. Their batches hold the tokens before the answer as `input_ids` and `attention_mask`.

    Other batches hold `input_ids` and `labels` `[batch, length]`, labels -100 where nothing is learnt and not shifted,
    and `attention_mask`, or with packing `position_ids`; see `DocumentBatch`.

    Args:
        batch_size: Rows in a training batch, on each device.
        max_length: Maximum number of tokens of a sample, and with packing of a row; None means 2,048, or the model's
            context if that is less.
        template: Name of a chat template (`alpaca`, `chatml`, `dialogue`, `gemma`, `llama3`, `mistral`, `phi3`,
            `plain`, `zephyr`), or a `.jinja` file; None means the tokenizer's own. `plain` concatenates prompts and
            completions.
        template_arguments: Further arguments of the chat template, such as `{enable_thinking: false}`.
        train_on: `assistant` learns the assistant's words only, `last` only those of its last turn, `all` every word.
        packing: Put several samples into a row of `max_length` tokens; they do not attend to each other.
        padding_side: `right` or `left`, where shorter rows are padded.
        streaming: Read, encode and shuffle `train` while training, for a file larger than memory. Give a file as `val`
            (or `val_size` 0), and the trainer a number of steps. Several files are read in turn; files with weights
            are mixed, a file that ends restarts, and an epoch ends when each was read once. Broken rows are skipped
            and counted, unless `bad_rows` is `refuse`.
        shuffle_buffer: Size of the buffer from which streamed rows are drawn.
        columns: For our names of fields, the names in the files, such as `{prompt: question, completion: answer}`.
        bad_rows: `refuse` ends with the first broken row, `skip` leaves broken rows out and counts them; None means
            `refuse`, and `skip` when streaming.
        test_size: Number or share of the rows to test on, where no source is given; 0 means none.
        group_by_length: Batch rows of similar length, which reduces padding; not with packing.
        **settings: Those of `RecordData`.

    Attributes:
        counts: As in `RecordData`; of those encoded also `cut` (at `max_length`), `answers_lost` (left out: no answer
            was left), `tokens` and `tokens_learnt`.
        fingerprint: SHA-256 of the samples and their splits; when streaming, of the files' names, sizes and ends.
        tokenizer: The tokenizer, once `setup` has run; its `chat_template` is the one in use.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = InstructionData("talk.jsonl", template="chatml", max_length=1024, packing=True)
    """

    shared: ClassVar[str] = "first question"
    needed: ClassVar[str] = "an answer or a text to learn from"

    def __init__(
        self,
        train: Source | None = None,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        template: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        train_on: str = "assistant",
        packing: bool = False,
        padding_side: str = "right",
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        columns: dict[str, str] | None = None,
        bad_rows: str | None = None,
        test_size: int | float | None = 0,
        group_by_length: bool = True,
        **settings: Any,  # noqa: ANN401 - those of RecordData
    ) -> None:
        super().__init__(
            train,
            batch_size=batch_size,
            bad_rows=bad_rows or ("skip" if streaming else "refuse"),
            test_size=test_size,
            group_by_length=group_by_length and not packing,
            **settings,
        )
        self.max_length = max_length
        self.template = template
        self.template_arguments = template_arguments or {}
        self.train_on = train_on
        self.packing = packing
        self.padding_side = padding_side
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.columns = columns or {}
        self._encoder: Encoder | None = None
        self._is_stream_told = False
        self._check_settings()

    def _check_settings(self) -> None:
        self._require_at_least(max_length=2, shuffle_buffer=1)
        self._require_one_of(train_on=("assistant", "last", "all"), padding_side=("right", "left"))
        if self.template is not None:
            chat_template(self.template)
        unknown = next((name for name in self.columns if name not in COLUMNS), None)
        if unknown is not None:
            near = nearest(unknown, COLUMNS, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"columns names the field {unknown!r}; expected {', '.join(COLUMNS)}.{hint}")
        if not self.streaming or not self.plan.has_own_source("train"):
            return
        for source in self.plan.parts("train"):
            if is_hub_name(source) or is_in_memory(source):
                what = f"the Hub data set {source!r}" if is_hub_name(source) else describe(source)
                raise ConfigError(f"streaming reads files, and train is {what}; save it as a file first.")
        sizes = self.plan.sizes
        is_divided = sizes["train"] is not None or sizes["test"]
        has_val = self.plan.has_own_source("val")
        if is_divided or (not has_val and sizes["val"] != 0):
            raise ConfigError(
                "streaming divides nothing: give files as val and test, or set val_size to 0, and leave train_size out."
            )

    # Rows.

    def columns_read(self, split: str) -> dict[str, str]:
        """Return nothing: the fields of a record determine its format."""
        return {}

    def read_row(self, record: Record, split: str, ignored: Counter[str]) -> Row | None:
        """Return a sample as a row, of a row to predict the question, and count the fields that it ignores."""
        if kind_of(split) == "predict":
            return self._question_row(record)
        sample = sample_from(record, self.columns, ignored)
        return None if sample is None else Row(sample.content, sample.group)

    def row_of(self, record: Record, split: str) -> Row | None:
        """Return a sample as a row."""
        return self.read_row(record, split, Counter())

    def _read(self) -> None:
        """Read what is not streamed."""
        plan = self.plan
        if self.streaming:
            self.plan = replace(plan, sources={**plan.sources, "train": None})
        super()._read()
        self.plan = plan
        if self._streams():
            digest = hashlib.sha256(self._as_drawn(self.fingerprint).encode())
            for path, _ in source_files(plan.sources["train"], plan.settings):
                digest.update(ends_of(path))
            self.fingerprint = digest.hexdigest()
        self._tell_incomplete(self.counts)

    def _announce(self, message: str) -> None:
        rank_zero_warn(message)

    def _tell_incomplete(self, counts: Mapping[str, int]) -> None:
        if counts["rows_incomplete"]:
            rank_zero_warn(
                f"{counts['rows_incomplete']} of {counts['rows_read']} rows of {self.plan.source_name('train')} are "
                "left out: they have a blank answer or text, or are not a question with an answer."
            )

    # The tokenizer and what it makes of the samples.

    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return the tokenizer with its template, its padding and its end settled."""
        self._encoder = build_encoder(
            name,
            model_facts(self._backbone() or name),
            template=self.template,
            saved_template=self._saved_template(),
            template_arguments=self.template_arguments,
            train_on=self.train_on,
            max_length=self.max_length,
            too_long=self.too_long,
            padding_side=self.padding_side,
            holds_instructions=self._holds_instructions,
        )
        self.tokenizer = self._encoder.tokenizer
        if self._streams():
            self._try_stream()
        return self._encoder.tokenizer

    def encoding_key(self) -> list[Any]:
        """Return the settings of the encoder."""
        encoder = self._require_encoder()
        names = [one.name for one in fields(encoder) if one.name != "tokenizer"]
        return [[name, str(getattr(encoder, name))] for name in names]

    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Encode samples, each into one document or several."""
        if kind_of(split) == "predict":
            yield from self._encode_questions(rows, counts)
            return
        encoder = self._require_encoder()
        for row, (content, place) in enumerate(rows):
            encoded = encoder.encode(sample_of(content, place))
            counts["cut"] += encoded.cut
            counts["answers_lost"] += encoded.num_lost
            counts.update({f"{_IGNORED}{name}": 1 for name in encoded.ignored})
            for document in map(document_from, encoded.pieces):
                counts["tokens"] += len(document.ids)
                counts["tokens_learnt"] += int((document.labels != UNSUPERVISED).sum())
                yield {"row": row, "input_ids": document.ids, "labels": document.labels}

    def _encode(self, split: str) -> EncodedRows | DocumentRows:  # type: ignore[override]  # rows of documents
        documents = super()._encode(split)
        if kind_of(split) == "predict":
            return documents
        max_length = self._require_encoder().max_length if self.packing else None
        mixture = self._mixture_of(documents) if self.packing and split == "train" else None
        rows = DocumentRows(documents, max_length=max_length, seed=self.seed, mixture=mixture)
        self.counts[split] = len(documents)
        kind = kind_of(split)
        self.counts[kind] = sum(self.counts[one] for one in self._splits_of(kind))
        rank_zero_info(f"Data: {len(documents)} {split} samples in {len(rows)} rows.")
        return rows

    def _documents(self, split: str) -> EncodedRows:
        rows: EncodedRows | DocumentRows = self._encoded_rows(split)
        return rows.documents if isinstance(rows, DocumentRows) else rows

    def _mixture(self) -> Mixture | None:
        # Packed rows hold the drawn samples already.
        return None if self.packing else super()._mixture()

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of samples that are too long; count the fields that the template leaves out."""
        if kind_of(split) == "predict":
            self._tell_cut_questions(split, lost.get("cut", 0))
            return
        self._count_ignored({name.removeprefix(_IGNORED): lost[name] for name in lost if name.startswith(_IGNORED)})
        self._tell_too_long(split, len(self._rows(split)), lost)

    def _count_ignored(self, ignored: Mapping[str, int]) -> None:
        self._about.ignored = Counter(self._about.ignored) + Counter(ignored)

    def _tell_too_long(self, split: str, num_rows: int, lost: Mapping[str, int]) -> None:
        cut, answers_lost = lost.get("cut", 0), lost.get("answers_lost", 0)
        if answers_lost and not cut:
            rank_zero_warn(
                f"{answers_lost} of {num_rows} {split} rows of {self.plan.source_name(split)} were left out: all of "
                "their answers are marked as not to be learnt, or have no token that could be."
            )
        elif cut:
            rank_zero_warn(
                f"{cut} of {num_rows} {split} rows of {self.plan.source_name(split)} are longer than "
                f"{self._require_encoder().max_length} tokens and were {_DID[self.too_long]}; {answers_lost} rows were "
                "left out because no answer was left of them. Set a larger max_length to keep them whole."
            )

    def _nothing_left(self, split: str, num_rows: int, lost: Mapping[str, int]) -> DataError:
        masked = f"All labels of the {num_rows} {split} rows of {self.plan.source_name(split)} are masked, so there is "
        if not lost.get("cut", 0):
            return DataError(f"{masked}nothing to learn: all of their answers are marked so, or have no token.")
        return DataError(
            f"{masked}nothing to learn: no answer lies within the first {self._require_encoder().max_length} tokens "
            f"({lost.get('cut', 0)} rows are longer). Set a larger max_length, or train_on to all."
        )

    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return nothing: an example's text is its decoded tokens."""
        return "", None

    def _example(self, columns: Mapping[str, Any], text: str, label: Any, source: str, line: int) -> Example:  # noqa: ANN401 - as RecordData has it
        decoded = self.tokenizer.decode(columns["input_ids"])
        return Example(decoded, columns["input_ids"], columns.get("labels"), label, source, line)

    # Streaming.

    def train_dataloader(self) -> Batches:
        """Return the training batches of this rank; each epoch has a different order."""
        if not self.streaming:
            return super().train_dataloader()
        num_replicas, rank = self._ranks()
        epoch = self.trainer.current_epoch if self.trainer else 0
        stream = replace(self._stream(), num_replicas=num_replicas, rank=rank, epoch=epoch)
        loader = StreamLoader(stream, self.batch_size, **self._loading())
        bad_rows = bad_rows_file(self.trainer)
        if rank == 0 and not self._is_stream_told:
            stream.notes = temporary_folder(self)
            loader.at_end = partial(self._tell_stream, stream.notes, bad_rows)
        return loader

    def _tell_stream(self, notes: Path, bad_rows: Path | None) -> None:
        """Report once what all worker processes dropped."""
        self._is_stream_told = True
        lost: Counter[str] = Counter()
        bad: list[tuple[str, str]] = []
        for entry in noted(notes):
            lost.update(entry.get("lost", {}))
            self._count_ignored(entry.get("ignored", {}))
            if "reason" in entry:
                bad.append((entry["reason"], entry["text"]))
        if bad:
            self._about.bad += bad
            self.counts["rows_bad"] = len(self._about.bad)
            write_bad_rows(self._about.bad, bad_rows)
        self._tell_incomplete(lost)
        self._tell_too_long("train", lost["rows_read"], lost)
        self._tell_ignored()

    def _streams(self) -> bool:
        return self.streaming and self.plan.has_own_source("train") and not self._reads_alone

    def _stream(self) -> StreamedRows:
        return StreamedRows(
            self.plan.sources["train"],
            self._require_encoder(),
            settings=self.plan.settings,
            columns=self.columns,
            skips_bad_rows=self.plan.bad_rows == "skip",
            packing=self.packing,
            buffer=self.shuffle_buffer,
            seed=self.seed,
        )

    def _try_stream(self) -> None:
        """Encode the first samples, so that errors in them are reported before training starts."""
        first = list(itertools.islice(self._stream().documents(), LOOKED_AT_FIRST))
        rank_zero_info(
            f"Data: {self.plan.source_name('train')} is streamed; its first {len(first)} samples have "
            f"{sum(len(document.ids) for document in first)} tokens."
        )

    # Batches.

    def _require_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ConfigError("The data is not read yet: call setup() first (the Trainer does).")
        return self._encoder

    def _collate(self) -> DocumentBatch:
        return DocumentBatch(
            self.tokenizer.pad_token_id, self.padding_side, self.packing, positions=self._takes_positions()
        )

    def _takes_positions(self) -> bool:
        """Return whether the model takes `position_ids`; assume so while there is no model.

        Raises:
            ConfigError: It does not, and packing needs them.
        """
        model = getattr(self._module(), "model", None)
        if model is None or "position_ids" in inspect.signature(model.forward).parameters:
            return True
        if self.packing:
            raise ConfigError(
                f"{type(model).__name__} takes no position_ids, so packed samples would see each other; set packing to "
                "false."
            )
        return False
