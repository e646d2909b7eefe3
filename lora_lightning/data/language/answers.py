"""Find the tokens to train on in the text that a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lora_lightning.data.language.conversations import Sample
from lora_lightning.data.language.rendering import Renderer, Rendering, Span
from lora_lightning.data.language.turns import Message
from lora_lightning.data.notices import warn
from lora_lightning.errors import DataError

_END_OF_THOUGHTS = "</think>"
# What occurs in no conversation.
_WORDS, _THOUGHTS = "zq0qz", "zq1qz"
_OTHER_CALL = {"name": _WORDS, "arguments": {_WORDS: _WORDS}}
_TALK = Sample("", (Message("user", "x"), Message("assistant", _WORDS)))
_THINKING_TALK = Sample("", (Message("user", "x"), Message("assistant", _WORDS, extra={"reasoning_content": "x"})))


@dataclass(frozen=True)
class View:
    """A text of a conversation, and the spans to train on.

    Args:
        text: The text.
        spans: Spans of characters to train on.
        count: Number of turns that it holds.
        learnt: Indices of the turns that are trained on in it.
    """

    text: str
    spans: tuple[Span, ...]
    count: int
    learnt: tuple[int, ...]


@dataclass(eq=False)
class AnswerFinder:
    """Finds the answers of conversations.

    An answer is what the template writes up to the end of its turn, minus what it writes for the turns before with
    `add_generation_prompt`. If the latter is not a prefix of the former, the answer begins after the header of its role
    in the text of the conversation: the last header before the first word that changes with the answer. A warning
    reports this once. With generation markers, only the marked part of the answer is trained on.

    A conversation has one view if the text up to each answer is a prefix of the text up to the next. If the template
    rewrites earlier turns (drops their thoughts, or frames the last answer differently), each answer is learnt from a
    separate view that ends with it.

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
        """Return the views of a conversation; none if no turn is to be trained on.

        Raises:
            DataError: There is no template, it refuses the conversation, or it marks no answers.
        """
        learnt = tuple(index for index, message in enumerate(sample.messages) if message.trained)
        if self.train_on != "assistant":
            learnt = learnt[-1:]
        if self.train_on == "all":
            text = self.renderer.write(sample).text
            # White space behind the last end mark is no word, and the model stops before it.
            words = text.rstrip()
            end = len(words) if any(words.endswith(mark) for mark in self.end_marks) else len(text)
            return [View(text, ((0, end),), len(sample.messages), learnt)]
        views = [self._view(sample, index) for index in learnt]
        if not views or not all(views[-1].text.startswith(view.text[: view.spans[-1][1]]) for view in views):
            return views
        whole = views[-1]
        spans = tuple(self._with_end(span, whole.text) for view in views for span in view.spans)
        return [View(whole.text, spans, whole.count, learnt)]

    def _view(self, sample: Sample, index: int) -> View:
        """Return the text of a conversation up to the end of one answer, which is trained on."""
        until = self.renderer.write(sample, index + 1)
        start = self._start(sample, index, until.text)
        spans = [(start, len(until.text))]
        if self.renderer.marks_answers:
            # A mark may stand around a block of thoughts that the generation prompt has opened already.
            spans = _joined([(max(first, start), last) for first, last in until.marked if last > start], until.text)
        if not spans:
            raise self._no_mark(sample, index, until)
        *earlier, (start, end) = spans
        end = self._end(start, end, until.text, sample.messages[index])
        return View(until.text, (*earlier, (start, end)), index + 1, (index,))

    def _start(self, sample: Sample, index: int, until: str) -> int:
        """Return where in the text up to an answer's end that answer begins."""
        prompt = self._written(sample, index, prompt=True)
        header = self._header
        if prompt is not None and until.startswith(prompt):
            # A template may write the header before answers though it writes no generation prompt.
            is_header_next = not prompt.endswith(header) and until.startswith(header, len(prompt))
            return len(prompt) + (len(header) if is_header_next else 0)
        start = self._behind_header(sample, index, until) or self._behind_question(sample, index, until)
        if start is None:
            raise DataError(
                f"{sample.place}: the assistant's words cannot be told from the rest: the chat template of "
                f"{self.renderer.tokenizer_name} has no assistant markers ({{% generation %}}), and what it writes for "
                f"the first {index + 1} turns does not begin with what it writes for those before. Add markers, set "
                "template to a named one, or set train_on to all."
            )
        if prompt is not None and not self._has_warned:
            self._has_warned = True
            warn(
                f"The chat template of {self.renderer.tokenizer_name} begins answers in another way than its "
                "generation prompt does; they are learnt as it writes them in the conversation."
            )
        return start

    def _behind_header(self, sample: Sample, index: int, until: str) -> int | None:
        """Return where the last header before the words of an answer ends; None where there is no header."""
        other = self._written(_reworded(sample, index), index + 1)
        if other is None:
            return None
        words = _num_shared(until, other)
        found = [(until.rfind(header, 0, words), header) for header in (self._header, self._short_header) if header]
        # The longer one may stand before an earlier answer only.
        return max((place + len(header) for place, header in found if place >= 0), default=None)

    def _behind_question(self, sample: Sample, index: int, until: str) -> int | None:
        """Return where the text continues after the turns before an answer; None if it does not begin with them."""
        before = self._written(sample, index) or ""
        start = _num_shared(until, before)
        question = sample.messages[index - 1].content if index else ""
        return start if "".join(question.split()) in "".join(until[:start].split()) else None

    @cached_property
    def _header(self) -> str:
        """What the template writes between a question and its answer; empty if unknown or blank."""
        asked, prompt, answered = self._written(_TALK, 1), self._written(_TALK, 1, prompt=True), self._written(_TALK, 2)
        if asked is None or prompt is None or answered is None:
            return ""
        before_words = answered.partition(_WORDS)[0]
        # A prompt that answers do not begin with may open a block of thoughts, which is not the header's.
        is_prompt_written = prompt != asked and before_words.startswith(prompt)
        opening = prompt if is_prompt_written else before_words
        header = opening[_num_shared(opening, asked) :]
        # White space before the words is the assistant's: a prompt ends without it.
        return header if header.strip() else ""

    @cached_property
    def _short_header(self) -> str:
        """The header without a block of thoughts that the template closes at once, in which other answers think."""
        thinking = self._written(_reworded(_THINKING_TALK, 1), 2) or ""
        asked = self._written(_TALK, 1) or ""
        opening = thinking[_num_shared(thinking, asked) :]
        shared = self._header[: _num_shared(self._header, opening)].partition("<think>")[0]
        return shared if shared.strip() else ""

    def _written(self, sample: Sample, count: int, *, prompt: bool = False) -> str | None:
        """Return what the template writes for the first turns, or None if it refuses so few."""
        try:
            return self.renderer.write(sample, count, prompt=prompt).text
        except DataError:
            return None

    def _end(self, start: int, end: int, text: str, message: Message) -> int:
        """Return where an answer ends: behind the mark that ends its turn, as nothing after it is the assistant's."""
        words = "" if message.extra.get("tool_calls") else message.content.strip()
        marks = list(self._end_mark.finditer(text, start, end))
        if words in text[start:end]:
            # The words may hold end marks themselves, so that one right behind them counts.
            marks = [mark for mark in marks if text[start : mark.start()].rstrip().endswith(words)]
        # Generation markers may leave the end mark out.
        last = marks[-1] if marks else self._end_mark.match(text, end)
        return last.end() if last else end

    def _with_end(self, span: Span, text: str) -> Span:
        """Return a span with the mark that ends it, where the template writes one only before a further turn."""
        start, end = span
        has_end = any(mark.end() == end for mark in self._end_mark.finditer(text, start, end))
        mark = None if has_end else self._end_mark.match(text, end)
        return (start, mark.end() if mark else end)

    @cached_property
    def _end_mark(self) -> re.Pattern[str]:
        """What ends a turn; matches nothing where no mark is known."""
        return re.compile("|".join(map(re.escape, self.end_marks)) or r"(?!)")

    def _no_mark(self, sample: Sample, index: int, until: Rendering) -> DataError:
        num_answers = sum(message.role == "assistant" for message in sample.messages)
        return DataError(
            f"{sample.place}: the chat template of {self.renderer.tokenizer_name} marks {len(until.marked)} answers "
            f"where the conversation has {num_answers}, and not turn {index + 1}; correct its generation markers, or "
            "choose a named template."
        )


def _reworded(sample: Sample, index: int) -> Sample:
    """Return a conversation with other words in one of its turns: content, thoughts and tool calls."""
    message = sample.messages[index]
    extra = dict(message.extra)
    content = _WORDS if message.content.strip() else message.content
    if _END_OF_THOUGHTS in message.content:
        content = f"<think>\n{_THOUGHTS}\n{_END_OF_THOUGHTS}\n\n{_WORDS}"
    if "reasoning_content" in extra:
        extra["reasoning_content"] = _THOUGHTS
    if "tool_calls" in extra:
        extra["tool_calls"] = [{**call, "function": _OTHER_CALL} for call in extra["tool_calls"]]
    other = replace(message, content=content, extra=extra)
    return replace(sample, messages=(*sample.messages[:index], other, *sample.messages[index + 1 :]))


def _num_shared(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts.

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
            start = joined.pop()[0]
        joined.append((start, end))
    return joined
