"""Turn conversations, prompts and texts into token ids, and tell which of them are to be learnt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lightning.data.chat_templates import TEMPLATE_NAMES, marks_answers
from lora_lightning.data.conversations import Sample
from lora_lightning.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens.

    Args:
        ids: The token ids.
        trained: For each of them, whether it is to be learnt.
        cut: Whether tokens beyond the maximum length were cut off.
    """

    ids: list[int]
    trained: list[bool]
    cut: bool = False

    @property
    def num_trained(self) -> int:
        """Number of tokens to be learnt; nothing stands before the first one, from which it could be predicted."""
        return sum(self.trained[1:])


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes samples with one tokenizer and one template.

    Args:
        tokenizer: The tokenizer.
        tokenizer_name: What messages call it.
        template: The chat template as Jinja; None where there is none: prompts and completions are plainly joined.
        max_length: Number of tokens after which a sample is cut.
        train_on: `assistant` learns the assistant's words, with the token that ends its turn; `all` learns all.
        begin: Tokens that stand before every text that no template frames.
        end_id: The token that ends a text; None where there is none.
        stop_ids: The tokens at which the model stops to generate, `end_id` among them.
        turn_end_ids: Tokens that end a turn, `stop_ids` among them.
        join_plainly: Whether prompts and completions given as texts are joined even where there is a template.
        vocabulary: Number of tokens that the model knows; None where that is not known.
    """

    tokenizer: Any
    tokenizer_name: str
    template: str | None
    max_length: int
    train_on: str = "assistant"
    begin: tuple[int, ...] = ()
    end_id: int | None = None
    stop_ids: frozenset[int] = frozenset()
    turn_end_ids: frozenset[int] = frozenset()
    join_plainly: bool = False
    vocabulary: int | None = None

    def encode(self, sample: Sample) -> Encoded:
        """Return a sample's tokens; see `Encoder`.

        Raises:
            DataError: A conversation has no template, or the template refuses it or hides where the answers are, or a
                token lies beyond the model's vocabulary.
        """
        begin = self.begin
        if not sample.messages:
            text, spans = sample.text, [(0, len(sample.text))]
        elif sample.plain and (self.template is None or self.join_plainly):
            prompt, completion = sample.plain
            text, spans = prompt + completion, [(len(prompt), len(prompt) + len(completion))]
        else:
            begin = ()
            text, spans = self._render(sample)
        if self.train_on == "all":
            spans = [(0, len(text))]
        ids, trained = self._tokenize(text, spans)
        self._end_turns(ids, trained)
        ids, trained = [*begin, *ids], [*(False for _ in begin), *trained]
        self._end_sample(ids, trained, complete=not sample.messages or sample.messages[-1].trained)
        self._require_known(ids, sample.place)
        return Encoded(ids[: self.max_length], trained[: self.max_length], cut=len(ids) > self.max_length)

    # Where the answers are in the text.

    def _render(self, sample: Sample) -> tuple[str, list[Span]]:
        """Return a conversation as its template writes it, and where in it the words to be learnt stand."""
        if self.template is None:
            raise DataError(
                f"{sample.place}: the tokenizer of {self.tokenizer_name} has no chat template, which a conversation "
                f"needs; set template to one of {', '.join(TEMPLATE_NAMES)}, or a .jinja file."
            )
        if self.train_on == "all":
            return self._written(sample, len(sample.messages))[0], []
        answers = [place for place, message in enumerate(sample.messages) if message.role == "assistant"]
        if marks_answers(self.template):
            text, spans = self._written(sample, len(sample.messages))
            if len(spans) != len(answers):
                raise DataError(
                    f"{sample.place}: the chat template of {self.tokenizer_name} marks {len(spans)} answers where the "
                    f"conversation has {len(answers)}; correct its generation markers, or choose a named template."
                )
        else:
            text, spans = self._found(sample, answers)
        pairs = zip(answers, spans, strict=True)
        return text, [span for place, span in pairs if sample.messages[place].trained]

    def _found(self, sample: Sample, answers: Sequence[int]) -> tuple[str, list[Span]]:
        """Find the answers from what the template writes for the conversation's beginnings."""
        text, spans = self._written(sample, len(sample.messages))[0], []
        for place in answers:
            before = self._written(sample, place, prompt=True)[0] if place else ""
            until = self._written(sample, place + 1)[0]
            if not (text.startswith(until) and until.startswith(before)):
                raise DataError(
                    f"{sample.place}: the assistant's words cannot be told from the rest: the chat template of "
                    f"{self.tokenizer_name} has no assistant markers ({{% generation %}}), and what it writes for this "
                    f"conversation does not begin with what it writes for its first {place + 1} turns. Add markers, "
                    "set template to a named one, or set train_on to all."
                )
            spans.append((len(before), len(until)))
        return text, spans

    def _written(self, sample: Sample, count: int, *, prompt: bool = False) -> tuple[str, list[Span]]:
        """Return what the template writes for the first turns, and which places in it are marked."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        assert self.template is not None
        try:
            texts, spans = render_jinja_template(
                [[message.as_dict() for message in sample.messages[:count]]],
                tools=list(sample.tools) or None,
                chat_template=self.template,
                return_assistant_tokens_mask=marks_answers(self.template),
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(
                f"{sample.place}: the chat template of {self.tokenizer_name} refuses this conversation: {reason}."
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []

    # From text to tokens.

    def _tokenize(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a text, none of which reaches over the edge of a span.

        A token over such an edge would hold the end of a prompt and the begin of its answer; the model never gets it
        when it answers, as its prompt ends there. The text is cut at these edges, and only at these.
        """
        edges = {edge for span in spans for edge in span if 0 < edge < len(text)}
        if self.tokenizer.is_fast:
            ids, ends = self._with_ends(text)
            starts = [0, *ends[:-1]]
            crossed = {edge for edge in edges for start, end in zip(starts, ends, strict=True) if start < edge < end}
        else:
            crossed = edges
        if not self.tokenizer.is_fast or crossed:
            cuts = [0, *sorted(crossed), len(text)]
            ids, ends = [], []
            for start, end in itertools.pairwise(cuts):
                piece_ids, piece_ends = self._with_ends(text[start:end])
                ids += piece_ids
                ends += [start + place for place in piece_ends]
        return ids, [any(start < place <= end for start, end in spans) for place in ends]

    def _with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return a text's tokens and where each ends, in ascending order; a slow tokenizer's all end with the text."""
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids, [len(text)] * len(ids)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends, last = [], 0
        for _, end in encoded["offset_mapping"]:
            last = max(last, end)
            ends.append(last)
        return list(encoded["input_ids"]), ends

    def _end_turns(self, ids: list[int], trained: list[bool]) -> None:
        """Let each answer end with the token that ends its turn: learn that one, and nothing after it."""
        if self.train_on == "all":
            return
        for start, end in _runs(trained):
            ends = [place for place in range(start, end) if ids[place] in self.turn_end_ids]
            if ends:
                # What a template writes behind the end of a turn, such as a new line, is not the assistant's.
                trained[ends[-1] + 1 : end] = [False] * (end - ends[-1] - 1)
            elif end < len(ids) and ids[end] in self.turn_end_ids:
                trained[end] = True

    def _end_sample(self, ids: list[int], trained: list[bool], *, complete: bool) -> None:
        """Leave out what follows the last answer, and end it with a token at which the model stops."""
        last = next((place for place in reversed(range(len(ids))) if trained[place]), None)
        if last is None:
            return
        del ids[last + 1 :], trained[last + 1 :]
        if complete and self.end_id is not None and ids[-1] not in self.stop_ids:
            ids.append(self.end_id)
            trained.append(True)

    def _require_known(self, ids: list[int], place: str) -> None:
        beyond = max(ids, default=0)
        if self.vocabulary is not None and beyond >= self.vocabulary:
            raise DataError(
                f"{place}: token {beyond} ({self.tokenizer.convert_ids_to_tokens(beyond)!r}) of the tokenizer of "
                f"{self.tokenizer_name} is beyond the vocabulary of the model, which knows {self.vocabulary} tokens; "
                "use the model's own tokenizer, or a template without this token."
            )


def _runs(flags: Sequence[bool]) -> list[Span]:
    """Return where each run of True begins, and where it has ended.

    Example:
        >>> _runs([False, True, True, False, True])
        [(1, 3), (4, 5)]
    """
    edges = [place for place in range(len(flags) + 1) if _at(flags, place) != _at(flags, place - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _at(flags: Sequence[bool], place: int) -> bool:
    return 0 <= place < len(flags) and flags[place]
