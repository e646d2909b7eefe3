"""Encode conversations, prompts and texts as token ids, with a mask of those to train on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_lightning.data.language.answers import AnswerFinder, View
from lora_lightning.data.language.conversations import Sample
from lora_lightning.data.language.coverage import Coverage
from lora_lightning.data.language.rendering import Renderer, Span
from lora_lightning.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens.

    Args:
        ids: The token ids.
        trained: For each of them, whether it is trained on.
    """

    ids: list[int]
    trained: list[bool]

    @property
    def num_trained(self) -> int:
        """Number of tokens to train on; the first token of a row has no predecessor and does not count."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class EncodedSample:
    """The encoding of a sample.

    Args:
        pieces: Its token sequences, each with tokens to train on: one, or several if the template rewrites earlier
            turns or a long text is split.
        cut: Whether one of its texts was longer than the maximum length.
        num_lost: Number of texts, or of pieces of a text, that were dropped: without tokens to train on, or too long.
        ignored: Names of fields that no text holds.
    """

    pieces: tuple[Encoded, ...]
    cut: bool = False
    num_lost: int = 0
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes samples with one tokenizer and one template.

    Args:
        tokenizer: The tokenizer.
        tokenizer_name: Its name in messages.
        template: The chat template as Jinja; None concatenates prompts and completions.
        max_length: Maximum number of tokens of a piece.
        too_long: Treatment of a longer text: `cut` keeps its beginning, `split` makes consecutive pieces, `drop` drops
            it.
        train_on: `assistant` trains on the assistant's words and the token that ends its turn; `last` on those of its
            last turn; `all` on all tokens.
        template_arguments: Further arguments of the template, such as `enable_thinking`.
        begin: Tokens before every text without a template.
        end_id: The token that ends a text, or None.
        stop_ids: The tokens at which the model stops to generate, `end_id` among them.
        turn_end_ids: Tokens that end a turn, `stop_ids` among them.
        join_plainly: Whether prompts and completions given as texts are concatenated even if there is a template.
        vocabulary: Size of the model's vocabulary; None if unknown.

    Raises:
        ConfigError: The template does not read one of its arguments, or the data sets it.
    """

    tokenizer: Any
    tokenizer_name: str
    template: str | None
    max_length: int
    too_long: str = "cut"
    train_on: str = "assistant"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    begin: tuple[int, ...] = ()
    end_id: int | None = None
    stop_ids: frozenset[int] = frozenset()
    turn_end_ids: frozenset[int] = frozenset()
    join_plainly: bool = False
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        """Check the template's arguments."""
        assert self._answers is not None

    def encode(self, sample: Sample) -> EncodedSample:
        """Return a sample's tokens; see `Encoder`.

        Raises:
            DataError: A conversation has no template, the template refuses it, hides the answers or omits something, or
                a token is beyond the model's vocabulary.
        """
        is_joined = sample.plain and (self.template is None or self.join_plainly)
        if is_joined or not sample.messages:
            prompt, answer = sample.plain or ("", sample.text)
            text = prompt + answer
            return self._fitted([self._tokens(text, [(len(prompt), len(text))], sample.place, begin=self.begin)])
        views = self._views(sample)
        ignored = self._coverage.check(sample, views)
        ends = self.train_on != "all" or sample.messages[-1].role == "assistant"
        texts = [self._tokens(view.text, view.spans, sample.place, ends=ends) for view in views]
        return self._fitted(texts, frozenset(ignored))

    def encode_question(self, sample: Sample) -> list[int]:
        """Return the tokens of a sample up to the begin of the assistant's next words.

        Args:
            sample: A conversation without its answer, a prompt, or a text to continue.

        Raises:
            DataError: A conversation has no template, the template refuses it, or a token is beyond the model's
                vocabulary.
        """
        is_joined = sample.plain and (self.template is None or self.join_plainly)
        if is_joined or not sample.messages:
            text, begin = sample.plain[0] if sample.plain else sample.text, self.begin
        else:
            text, begin = self._answers.renderer.write(sample, prompt=True).text, ()
        ids, _ = self._tokenize(_without_half_pairs(text), [])
        self._require_known(ids, sample.place)
        return [*begin, *ids]

    def _views(self, sample: Sample) -> list[View]:
        """Return a conversation's views; if an answer is not found, check whether the template omits something."""
        try:
            return self._answers.views(sample)
        except DataError:
            text = self._answers.renderer.write(sample).text
            self._coverage.check(sample, [View(text, (), len(sample.messages), ())])
            raise

    @cached_property
    def _answers(self) -> AnswerFinder:
        renderer = Renderer(
            tokenizer_name=self.tokenizer_name,
            template=self.template,
            special_tokens=self.tokenizer.special_tokens_map,
            arguments=self.template_arguments,
        )
        end_marks = self.tokenizer.convert_ids_to_tokens(sorted(self.turn_end_ids))
        return AnswerFinder(renderer, self.train_on, tuple(end_marks))

    @cached_property
    def _coverage(self) -> Coverage:
        return Coverage(self._answers.renderer)

    # Length.

    def _fitted(self, texts: Sequence[Encoded], ignored: frozenset[str] = frozenset()) -> EncodedSample:
        """Return the texts in pieces that are no longer than allowed."""
        pieces_of = [self._pieces(text) for text in texts]
        kept = tuple(piece for pieces in pieces_of for piece in pieces if piece.num_trained)
        # A text that is dropped counts as one piece, and so does a sample without a text, as it has no answer to learn.
        num_pieces = sum(max(len(pieces), 1) for pieces in pieces_of) or 1
        is_cut = any(len(text.ids) > self.max_length for text in texts)
        return EncodedSample(kept, is_cut, num_pieces - len(kept), ignored)

    def _pieces(self, text: Encoded) -> list[Encoded]:
        length = len(text.ids)
        if length <= self.max_length:
            return [text]
        end = {"cut": self.max_length, "split": length, "drop": 0}[self.too_long]
        parts = [slice(start, start + self.max_length) for start in range(0, end, self.max_length)]
        return [Encoded(text.ids[part], text.trained[part]) for part in parts]

    # From text to tokens.

    def _tokens(
        self, text: str, spans: Sequence[Span], place: str, *, begin: tuple[int, ...] = (), ends: bool = True
    ) -> Encoded:
        """Return a text's tokens up to the last one to train on, and with `ends` a token at which the model stops."""
        ids, trained = self._tokenize(_without_half_pairs(text), spans)
        last = max((index for index, is_trained in enumerate(trained) if is_trained), default=-1)
        if last >= 0:
            del ids[last + 1 :], trained[last + 1 :]
        if ends and last >= 0 and self.end_id is not None and ids[-1] not in self.stop_ids:
            ids.append(self.end_id)
            trained.append(True)
        self._require_known(ids, place)
        return Encoded([*begin, *ids], [*(False for _ in begin), *trained])

    def _tokenize(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a text, none of which crosses the edge of a span.

        A token across such an edge would hold the end of a prompt and the begin of its answer. It never occurs when the
        model answers, since the prompt ends there. The text is split only at these edges before tokenization.
        """
        ids, ends = self._with_ends(text)
        edges = {edge for span in spans for edge in span if 0 < edge < len(text)}
        crossed = sorted(edges.difference(ends))
        if crossed:
            ids, ends = [], []
            for start, end in itertools.pairwise([0, *crossed, len(text)]):
                piece_ids, piece_ends = self._with_ends(text[start:end])
                ids += piece_ids
                ends += [start + place for place in piece_ends]
        return ids, [any(start < end <= last for start, last in spans) for end in ends]

    def _with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return tokens and their ascending end positions; with a slow tokenizer these are all the end of the text."""
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids, [len(text)] * len(ids)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), list(itertools.accumulate(ends, max))

    def _require_known(self, ids: list[int], place: str) -> None:
        beyond = max(ids, default=0)
        if self.vocabulary is not None and beyond >= self.vocabulary:
            raise DataError(
                f"{place}: token {beyond} ({self.tokenizer.convert_ids_to_tokens(beyond)!r}) of the tokenizer of "
                f"{self.tokenizer_name} is beyond the vocabulary of the model, which knows {self.vocabulary} tokens; "
                "use the model's own tokenizer, or a template without this token."
            )


def _without_half_pairs(text: str) -> str:
    """Replace lone surrogates, which JSON can hold: they are not characters, and tokenizers refuse them."""
    return text.encode("utf-8", "replace").decode("utf-8")
