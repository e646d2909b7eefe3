"""Find in what a chat template writes the words that are to be learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.language.conversations import Sample
from lora_lightning.data.language.rendering import Renderer, Rendering, Span
from lora_lightning.data.language.turns import Message
from lora_lightning.errors import DataError

# What a generation prompt may end with beyond the role's header: a block of thoughts, left open or empty.
_BLOCK_OF_THOUGHTS = re.compile(r"(<(?:think|thinking|thought)>\s*)?(</(?:think|thinking|thought)>\s*)?\Z")


@dataclass(frozen=True)
class View:
    """A text of a conversation, and what is learnt of it.

    Args:
        text: The text.
        spans: Where the words to be learnt stand.
        count: Number of turns that it holds.
        learnt: Indices of the turns that are learnt in it.
    """

    text: str
    spans: tuple[Span, ...]
    count: int
    learnt: tuple[int, ...]


@dataclass(eq=False)
class AnswerFinder:
    """Finds the answers of conversations.

    An answer is what the template writes up to the end of its turn, minus what it writes for the turns before with
    `add_generation_prompt`. Where the latter is no prefix of the former, the answer begins after its role's header in
    the conversation's own text, and a warning tells so once. Of this, a template with generation markers has learnt
    what it marks.

    A conversation is one view where each answer's text is the beginning of the next one's. Where the template writes
    earlier turns anew (drops their thoughts, or frames the last answer in another way), each answer is learnt from a
    view of its own, that ends with it.

    Args:
        renderer: Writes the conversations.
        train_on: `assistant` learns all answers, `last` the last one, `all` every word of the text.
        end_marks: Texts of the tokens that end a turn.
    """

    renderer: Renderer
    train_on: str = "assistant"
    end_marks: Sequence[str] = ()
    _has_warned: bool = field(default=False, init=False)

    def views(self, sample: Sample) -> list[View]:
        """Return the views of a conversation; none where no turn is to be learnt.

        Raises:
            DataError: There is no template, it refuses the conversation, or it marks no answers.
        """
        if self.train_on == "all":
            text = self.renderer.write(sample).text
            return [View(text, ((0, len(text)),), len(sample.messages), _learnt(sample.messages)[-1:])]
        learnt = _learnt(sample.messages)
        if self.train_on == "last":
            learnt = learnt[-1:]
        if not learnt:
            return []
        written = [self.renderer.write(sample, index + 1) for index in learnt]
        spans = [self._spans(sample, index, until) for index, until in zip(learnt, written, strict=True)]
        pairs = zip(written, spans, strict=True)
        if all(written[-1].text.startswith(until.text[: found[-1][1]]) for until, found in pairs):
            together = tuple(span for found in spans for span in found)
            return [View(written[-1].text, together, learnt[-1] + 1, learnt)]
        found = zip(learnt, written, spans, strict=True)
        return [View(until.text, tuple(those), index + 1, (index,)) for index, until, those in found]

    def _spans(self, sample: Sample, index: int, until: Rendering) -> list[Span]:
        """Return where in the text up to an answer's end that answer stands."""
        message, end = sample.messages[index], len(until.text)
        if not self.renderer.marks_answers:
            start = self._start(sample, index, until.text)
            return [self._up_to_end((start, end), until.text, message)]
        joined = _joined(self._marked(sample, index, until), until.text)
        if not joined:
            num_answers = sum(message.role == "assistant" for message in sample.messages)
            raise DataError(
                f"{sample.place}: the chat template of {self.renderer.tokenizer_name} marks {len(until.marked)} "
                f"answers where the conversation has {num_answers}, and not turn {index + 1}; correct its generation "
                "markers, or choose a named template."
            )
        return [*joined[:-1], self._up_to_end(joined[-1], until.text, message)]

    def _marked(self, sample: Sample, index: int, until: Rendering) -> list[Span]:
        """Return what the template marks of one answer."""
        num_answers = sum(message.role == "assistant" for message in sample.messages[: index + 1])
        if len(until.marked) == num_answers and not until.text.startswith("<", until.marked[-1][0]):
            return [until.marked[-1]]
        # Several marks an answer, or a mark around a block of thoughts that the generation prompt has opened already.
        start = self._start(sample, index, until.text)
        marked = [(max(first, start), last) for first, last in until.marked]
        return [span for span in marked if span[0] < span[1]]

    # Where an answer begins.

    def _start(self, sample: Sample, index: int, until: str) -> int:
        """Return where in the text up to an answer's end that answer begins."""
        before = self._written(sample, index, prompt=True)
        if before is not None and until.startswith(before):
            has_opening = until.startswith(self._opening, len(before))
            return len(before) + (len(self._opening) if has_opening else 0)
        start = self._start_in_own_text(sample, index, until, before)
        asked = sample.messages[index - 1].content if index else ""
        if "".join(asked.split()) not in "".join(until[:start].split()):
            raise DataError(
                f"{sample.place}: the assistant's words cannot be told from the rest: the chat template of "
                f"{self.renderer.tokenizer_name} has no assistant markers ({{% generation %}}), and what it writes for "
                f"the first {index + 1} turns does not begin with what it writes for those before. Add markers, set "
                "template to a named one, or set train_on to all."
            )
        if before is not None:
            self._warn_of_own_text()
        return start

    def _start_in_own_text(self, sample: Sample, index: int, until: str, before: str | None) -> int:
        """Return where an answer begins whose text does not begin with its generation prompt."""
        turns = self._written(sample, index) or ""
        shared = _num_shared(until, before or turns)
        header = self._header
        if before is not None and before.startswith(turns):
            header = _without_thoughts(before[len(turns) :])
            if shared >= len(turns) + len(header):
                return len(turns) + len(header)
        at = until.find(header, max(shared - len(header), 0)) if header else -1
        return at + len(header) if at >= 0 else shared

    def _written(self, sample: Sample, count: int, *, prompt: bool = False) -> str | None:
        """Return what the template writes for the first turns, or None where it refuses so few."""
        try:
            return self.renderer.write(sample, count, prompt=prompt).text
        except DataError:
            return None

    @cached_property
    def _header(self) -> str:
        """What the template writes between a question and its answer; empty where that cannot be told."""
        question = Sample("", (Message("user", "x"),))
        asked, led = self._written(question, 1), self._written(question, 1, prompt=True)
        if asked is None or led is None or not led.startswith(asked):
            return ""
        return _without_thoughts(led[len(asked) :])

    @cached_property
    def _opening(self) -> str:
        """The header that a template writes before answers though it writes no generation prompt; else empty."""
        if self._header:
            return ""
        question, words = Message("user", "x"), "zq0qz"
        asked = self._written(Sample("", (question,)), 1)
        answered = self._written(Sample("", (question, Message("assistant", words))), 2)
        if asked is None or answered is None or not answered.startswith(asked):
            return ""
        opening = answered[len(asked) :].partition(words)[0]
        # White space before the words is the assistant's: a prompt ends without it.
        return opening if opening.strip() else ""

    def _warn_of_own_text(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        rank_zero_warn(
            f"The chat template of {self.renderer.tokenizer_name} begins answers in another way than its generation "
            "prompt does; they are learnt as it writes them in the conversation."
        )

    # Where it ends.

    def _up_to_end(self, span: Span, text: str, message: Message) -> Span:
        """Let an answer end with the mark that ends its turn: nothing after it is the assistant's."""
        start, end = span
        words, span_text = message.content.strip(), text[start:end]
        marks = list(self._end_mark.finditer(span_text))
        ends = [mark.end() for mark in marks]
        if words in span_text and not message.extra.get("tool_calls"):
            # The words may hold end marks themselves, so that one right behind them counts.
            ends = [mark.end() for mark in marks if span_text[: mark.start()].rstrip().endswith(words)]
        if ends:
            return start, start + ends[-1]
        following = self._end_mark.match(text, end)
        return start, following.end() if following else end

    @cached_property
    def _end_mark(self) -> re.Pattern[str]:
        """What ends a turn; matches nothing where no mark is known."""
        return re.compile("|".join(map(re.escape, self.end_marks)) or r"(?!)")


def _without_thoughts(prompt: str) -> str:
    """Return a generation prompt without the block of thoughts that it opens.

    Example:
        >>> _without_thoughts("<assistant><think> ")
        '<assistant>'
    """
    return _BLOCK_OF_THOUGHTS.sub("", prompt, count=1)


def _learnt(messages: Sequence[Message]) -> tuple[int, ...]:
    return tuple(index for index, message in enumerate(messages) if message.trained)


def _num_shared(one: str, other: str) -> int:
    """Return with how many of the same letters two texts begin.

    Example:
        >>> _num_shared("answer", "another")
        2
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _joined(spans: Sequence[Span], text: str) -> list[Span]:
    """Join spans with nothing but white space between them.

    Example:
        >>> _joined([(0, 2), (3, 5), (7, 8)], "ab cd  e")
        [(0, 8)]
    """
    joined: list[Span] = []
    for start, end in spans:
        if joined and not text[joined[-1][1] : start].strip():
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
