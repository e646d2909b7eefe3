"""The command `lora-lightning chat`."""

from __future__ import annotations

import contextlib
import importlib
import secrets
import sys
from typing import Literal

from lora_lightning.commands._language.model import Device, LanguageModel, Message, load_language_model
from lora_lightning.commands._language.sampling import Sampling
from lora_lightning.errors import ConfigError

HELP = "Type a message. /reset starts over, /exit or Ctrl-D leaves."
YOU, MODEL = "you> ", "model> "


def chat(
    ckpt_path: str | None = None,
    adapter_dir: str | None = None,
    backbone: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int | None = None,
    template: str | None = None,
    device: Device = "auto",
    task_class: str | None = None,
) -> None:
    """Chat with a fine-tuned language model; Ctrl-D exits.

    The model sees the whole conversation, formatted with the chat template of its training, or its tokenizer's own.
    When the conversation no longer fits, its oldest turns are dropped.

    Args:
        ckpt_path: The .ckpt file, such as runs/version_0/checkpoints/last.ckpt.
        adapter_dir: An adapter folder instead, ours or PEFT's.
        backbone: The base, if it is not the one that the adapter was trained on; without an adapter, the model to use.
        system: The system message.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: 0 decodes greedily; a larger value samples.
        top_p: Sample from the most probable tokens whose probabilities sum to this.
        top_k: Sample from this many of the most probable tokens; 0 means all.
        seed: Seed of the sampling, for reproducible answers.
        template: A chat template to use instead of the training's: its name (chatml, gemma, ...) or a .jinja file.
        device: Where to run: auto, cpu, cuda or mps.
        task_class: Import path of the task, for a checkpoint of a task of your own.
    """
    if temperature == 0:
        top_p = 1.0  # the default, which only drawing has a use for
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    speaker = load_language_model(
        ckpt_path, adapter_dir, backbone, template=template, device=device, task_class=task_class
    )
    if speaker.has_encoder:
        raise ConfigError(
            f"{speaker.name} reads a text with its encoder and answers it; it holds no conversation. Use "
            "lora-lightning generate."
        )
    conversation = Conversation(speaker, sampling, system=system, seed=seed)
    conversation.check()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # arrow keys and history, where the system has it
    print(HELP)
    with contextlib.suppress(KeyboardInterrupt):
        while (said := _read()) is not None:
            if conversation.hear(said) == "leave":
                return
    print()


class Conversation:
    """The turns of a chat so far, as many as the model can see.

    Args:
        speaker: The model.
        sampling: Its sampling settings.
        system: The system message.
        seed: Seed of the sampling; None draws one for each answer.
    """

    def __init__(
        self, speaker: LanguageModel, sampling: Sampling, *, system: str | None = None, seed: int | None = None
    ) -> None:
        self.speaker, self.sampling, self.seed = speaker, sampling, seed
        self.opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Message] = []

    def check(self) -> None:
        """Check that there is a template and room for an answer, before the first input.

        Raises:
            ConfigError: One of them is missing.
        """
        if self._tokens([{"role": "user", "content": "x"}]) is None:
            raise ConfigError(
                f"The model takes {self.speaker.context} tokens, which the system message and an answer of "
                f"{self.sampling.max_new_tokens} fill; shorten them."
            )

    def hear(self, said: str) -> Literal["continue", "leave"]:
        """Process the user's input: a command, or a message to answer."""
        match said.strip():
            case "":
                return "continue"
            case "/exit" | "/quit":
                return "leave"
            case "/reset":
                self.turns.clear()
                print("The conversation starts over.")
            case "/help":
                print(HELP)
            case message:
                self._answer(message)
        return "continue"

    def _answer(self, message: str) -> None:
        turns = [*self.turns, {"role": "user", "content": message}]
        num_dropped = 0
        while (ids := self._tokens(turns)) is None and len(turns) > 1:
            turns, num_dropped = turns[2:], num_dropped + 2  # a question and its answer
        if ids is None:
            print("This message is too long for the model; send a shorter one.")
            return
        if num_dropped:
            print(f"({num_dropped} of the oldest messages no longer fit and are left out.)")
        seed = secrets.randbits(32) if self.seed is None else self.seed
        print(MODEL, end="", flush=True)
        text = self.speaker.go_on(ids, self.sampling, seed=seed, is_chat=True, write=_write)
        print()
        self.turns = [*turns, {"role": "assistant", "content": text.strip()}]

    def _tokens(self, turns: list[Message]) -> list[int] | None:
        """Return the tokens of a conversation, or None if they leave no room for an answer."""
        ids = self.speaker.encode_chat([*self.opening, *turns])
        return ids if len(ids) + self.sampling.max_new_tokens <= self.speaker.context else None


def _read() -> str | None:
    """Return the next line that the user types, None at the end of the input."""
    try:
        return input(YOU)
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
