"""Rows to answer by a model: everything before the answer."""

from __future__ import annotations

import abc
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.data.batches.batching import PadToLongest
from lora_lightning.data.batches.streaming import pass_over
from lora_lightning.data.language.conversations import Sample, sample_from, sample_of
from lora_lightning.data.language.encoding import Encoder
from lora_lightning.data.language.values import Context, list_from
from lora_lightning.data.model_facts import model_facts
from lora_lightning.data.record_data import RecordData
from lora_lightning.data.rows.row import Row, StoredRow
from lora_lightning.data.sources import Record, read_records
from lora_lightning.errors import DataError

LOOKED_AT_FIRST = 100
"""Number of records that are examined before all are read."""
_ANSWER = "answer"
_TURN = {"role": "assistant", "content": _ANSWER}
_TARGETS = ("completion", "output")
"""Our names of fields that hold an answer, which rows to predict need not have."""


def question_from(record: Record, columns: Mapping[str, str]) -> Sample:
    """Convert a record into a question without its answer, if it holds one.

    Args:
        record: A record of the formats of `sample_from`, in which `completion`, `output` and the last turn of the
            assistant may be missing.
        columns: As for `sample_from`.

    Raises:
        DataError: There is no question, or the record is malformed.

    Example:
        >>> question_from(Record("a.jsonl", 1, "line", {"prompt": "1 + 1 ="}), {}).plain
        ('1 + 1 =', '')
    """
    fields = dict(record.fields)
    there = {ours: theirs for ours, theirs in columns.items() if ours not in _TARGETS or theirs in fields}
    sample = sample_from(replace(record, fields=_with_answer(fields, there, Context(record.place))), there)
    question = None if sample is None else without_answer(sample)
    if question is None:
        raise DataError(f"{record.place}: there is no question to answer; expected a prompt, or a turn of the user.")
    return question


def without_answer(sample: Sample) -> Sample | None:
    """Return a sample without the assistant's words at its end; None if it is otherwise empty.

    Example:
        >>> without_answer(Sample("a.jsonl, line 1", text="Once upon")).text
        'Once upon'
    """
    if not sample.messages:
        return sample
    count = len(sample.messages)
    while count and sample.messages[count - 1].role == "assistant":
        count -= 1
    plain = (sample.plain[0], "") if sample.plain else ()
    return replace(sample, messages=sample.messages[:count], plain=plain) if count else None


def _with_answer(fields: dict[str, Any], columns: Mapping[str, str], at: Context) -> dict[str, Any]:
    """Return the fields of a record with some answer, which the readers of samples to learn from expect."""

    def named(name: str) -> str:
        return columns.get(name, name)

    turns = next((name for name in ("messages", "conversations") if fields.get(named(name)) is not None), None)
    if turns is not None:
        given = list_from(fields[named(turns)], turns, "turns", at)
        return {**fields, named(turns): [*given, _TURN] if given else []}
    prompt = fields.get(named("prompt"))
    if prompt is not None:
        return {**fields, named("completion"): _ANSWER if isinstance(prompt, str) else [_TURN]}
    if fields.get(named("instruction")) is not None:
        return {**fields, named("output"): _ANSWER}
    dialogue = fields.get(named("dialogue"))
    if isinstance(dialogue, list) and dialogue:
        asked = len(dialogue) - (len(dialogue) + 1) % 2  # a statement at an even number answers the one before
        return {**fields, named("dialogue"): [*dialogue[:asked], _ANSWER]}
    return fields


@dataclass(frozen=True)
class QuestionBatch:
    """Makes a batch of questions.

    Args:
        pad: Pads them.
        most: Maximum number of tokens of a question; of a longer one the last are kept, since the answer follows them.
    """

    pad: PadToLongest
    most: int

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, `[batch, length]` each."""
        return self.pad([{"input_ids": item["input_ids"][-self.most :]} for item in items])


class QuestionRows(RecordData, abc.ABC):
    """The part of `InstructionData` that lets a model answer the rows to predict."""

    columns: dict[str, str]
    padding_side: str

    @abc.abstractmethod
    def _require_encoder(self) -> Encoder:
        """Return the encoder."""

    def _holds_instructions(self) -> bool:
        """Return whether some of the first records are instructions, for which there is a template of their own."""
        split = "predict" if self._reads_alone else "train"
        parts = self.plan.parts(split) if self.plan.sources.get(split) is not None else []
        streams = [read_records(source, self.plan.settings, on_bad=pass_over) for source in parts]
        first = itertools.chain.from_iterable(itertools.islice(records, LOOKED_AT_FIRST) for records in streams)
        needed = ("instruction",) if self._reads_alone else ("instruction", "output")
        names = {self.columns.get(name, name) for name in needed}
        return any(record.fields.keys() >= names for record in first)

    def _question_row(self, record: Record) -> Row:
        question = question_from(record, self.columns)
        return Row(question.content, question.group)

    def _encode_questions(self, rows: list[StoredRow], counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Encode the questions of rows, each up to where its answer begins."""
        encoder = self._require_encoder()
        for row, (content, place) in enumerate(rows):
            question = without_answer(sample_of(content, place))
            ids = [] if question is None else encoder.encode_question(question)
            if not ids:
                raise DataError(f"{place}: the question has no tokens; give it at least one word.")
            counts["cut"] += len(ids) > encoder.max_length
            yield {"row": row, "input_ids": ids[-encoder.max_length :]}

    def _tell_cut_questions(self, split: str, num_cut: int) -> None:
        if num_cut:
            rank_zero_warn(
                f"{num_cut} of {len(self._rows(split))} {split} rows of {self.plan.source_name(split)} are longer than "
                f"{self._require_encoder().max_length} tokens; their beginning was cut off. Set a larger max_length."
            )

    def _collate_to_predict(self) -> QuestionBatch:
        most = self._require_encoder().max_length
        context = model_facts(self._backbone() or self._name_of_tokenizer()).context
        if context is not None:
            wanted = getattr(self._module(), "max_new_tokens", 1)
            most = min(most, max(context - wanted, context // 2))  # the answer needs positions too
        return QuestionBatch(PadToLongest({"input_ids": self.tokenizer.pad_token_id}, self.padding_side), most)
