"""Base of `generate` and `chat`: a language model with its tokenizer, from a checkpoint, an adapter or a base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_lightning.adapters import is_attached
from lora_lightning.backbones.load import load_backbone, load_tokenizer, locate
from lora_lightning.backbones.storage.quantized import is_quantized
from lora_lightning.checkpoint.folder import is_adapter_folder
from lora_lightning.checkpoint.manifest import read_manifest
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.commands._language.sampling import Sampling, StopWriter, before_stop
from lora_lightning.errors import BackboneError, CheckpointError, ConfigError
from lora_lightning.paths import resolve
from lora_lightning.tasks import AdapterTask, CausalLM, Seq2SeqLM
from lora_lightning.tasks.generation import (
    Batching,
    batching_of,
    generate,
    has_encoder,
    max_positions,
    searches_with_beams,
)
from lora_lightning.texts.chat_templates import TEMPLATE_NAMES, begins_with_bos, chat_template
from lora_lightning.texts.saved_tokenizer import stop_ids

log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda", "mps"]
Message = dict[str, str]
_ROOM_OF_TRIAL = 6


@dataclass(frozen=True)
class LanguageModel:
    """A language model for generation, with its tokenizer and settings.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: Name of its source, for messages.
        answers: Whether it answers messages, by its training or by request, instead of continuing texts.
        prefix: Prefix of every text in its training (`Seq2SeqData`), such as `summarize: `.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    answers: bool = False
    prefix: str = ""

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, and so a base to compare with."""
        return is_attached(self.model)

    @property
    def chat_template(self) -> str | None:
        """The requested template, or that of the training, or the tokenizer's own; else None."""
        template: str | None = getattr(self.tokenizer, "chat_template", None)
        return template

    @property
    def context(self) -> float:
        """Number of positions of the model; infinity if its config sets no limit."""
        return max_positions(self.model)

    @property
    def has_encoder(self) -> bool:
        """Whether it answers texts that its encoder reads, instead of continuing them."""
        return has_encoder(self.model)

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids; without an end token, unless an encoder reads them."""
        ids = list(self.tokenizer(self.prefix + text)["input_ids"])
        if self.has_encoder:
            return ids
        ends = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id} - {None, self.tokenizer.bos_token_id}
        return ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation up to the assistant's next words.

        Raises:
            ConfigError: There is no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ConfigError(
                f"The tokenizer of {self.name} has no chat template, and its training named none; choose one with "
                f"--template ({', '.join(TEMPLATE_NAMES)})."
            )
        from jinja2 import TemplateError

        try:
            ids = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ConfigError(f"The chat template of {self.name} refuses these messages: {error}") from error
        return list(ids)

    def stops(self, *, is_chat: bool, texts: Sequence[str] = ()) -> list[int]:
        """Return the tokens that end an answer.

        Args:
            is_chat: Whether the end of a turn ends it too.
            texts: Stop texts; those that are special tokens, which do not appear in an answer's text, are added.
        """
        special = set(self.tokenizer.all_special_ids)
        named = [index for text in texts if (index := self.tokenizer.get_vocab().get(text)) in special]
        return [*stop_ids(self.tokenizer, is_chat=is_chat), *named]

    def go_on(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
        is_chat: bool = False,
        write: Callable[[str], None] | None = None,
    ) -> str:
        """Return the generated text after some tokens.

        Args:
            ids: The tokens.
            sampling: How to choose the next ones.
            seed: Seed of the sampling.
            is_chat: Whether the tokens are a conversation.
            write: Called with the words when they are generated.
        """
        if write is None:
            return self._answers([ids], sampling, seed, is_chat)[0]
        if sampling.temperature == 0 and searches_with_beams(self.model):  # no word is certain before the last
            text = self._answers([ids], sampling, seed, is_chat)[0]
            write(text)
            return text
        writer = StopWriter(sampling.stop, write)
        text = self._answers([ids], sampling, seed, is_chat, _streamer(self.tokenizer, writer.write))[0]
        writer.close()
        return text

    def go_on_all(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, is_chat: bool = False
    ) -> list[str]:
        """Return the generated text after each of several prompts, in batches if that does not change the result.

        Prompts with less room for an answer get separate batches, and so do prompts of different lengths if the model
        does not mask padding; a model that mixes the rows of a batch processes one prompt at a time.

        Args:
            prompts: The tokens of each prompt.
            sampling: How to choose the next ones.
            seed: Seed of the sampling; each prompt starts from it.
            is_chat: Whether the tokens are conversations.
        """
        batching = self._batching(prompts)
        groups: dict[tuple[float, int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            same = {"any": 0, "same length": len(prompt), "alone": index}[batching]
            groups.setdefault((min(sampling.max_new_tokens, self._room(prompt)), same), []).append(index)
        texts = [""] * len(prompts)
        for members in groups.values():
            answers = self._answers([prompts[index] for index in members], sampling, seed, is_chat)
            for index, text in zip(members, answers, strict=True):
                texts[index] = text
        return texts

    def _batching(self, prompts: Sequence[Sequence[int]]) -> Batching:
        """Return the batches of prompts; the model is tested with the shortest prompt."""
        shortest = min(prompts, key=len)
        if len(prompts) == 1 or self._room(shortest) <= _ROOM_OF_TRIAL:
            return "alone"
        batching = batching_of(self.model, shortest)
        if batching != "any":
            what = {"same length": "prompts of the same length", "alone": "one prompt at a time"}[batching]
            log.warning("Other prompts of a batch change what %s answers: it gets %s.", self.name, what)
        return batching

    def _room(self, prompt: Sequence[int]) -> float:
        return self.context - (0 if self.has_encoder else len(prompt))

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        is_chat: bool,
        streamer: Any = None,  # noqa: ANN401 - transformers' streamers have no public base class with types
    ) -> list[str]:
        longest = max(prompts, key=len)
        if 0 < self._room(longest) < sampling.max_new_tokens:
            log.warning("After these %d tokens the model has room for %d more.", len(longest), self._room(longest))
        answers = generate(
            self.model,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            stop=self.stops(is_chat=is_chat, texts=sampling.stop),
            is_complete=self._completeness(sampling.stop),
            seed=seed,
            streamer=streamer,
        )
        return [before_stop(self._decode(answer), sampling.stop) for answer in answers]

    def _completeness(self, stops: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """Return a function that returns whether an answer holds a stop text; it reads only the answer's end."""
        if not stops:
            return None
        num_last = 4 * max(map(len, stops)) + 16  # a character takes up to four bytes, and so up to four tokens

        def is_complete(ids: Sequence[int]) -> bool:
            text = self._decode(ids[-num_last:])
            return any(stop in text for stop in stops)

        return is_complete

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_language_model(
    ckpt_path: str | None,
    adapter_dir: str | None,
    backbone: str | None,
    *,
    template: str | None = None,
    device: Device = "auto",
    task_class: str | None = None,
) -> LanguageModel:
    """Load a language model from a checkpoint, an adapter folder or a base.

    Args:
        ckpt_path: A checkpoint of a task for language models.
        adapter_dir: An adapter folder, ours or PEFT's.
        backbone: The base of the adapter, if it is not the one that it was trained on; without an adapter, the model.
        template: Name of a chat template, or a `.jinja` file; None takes the one that the training used.
        device: Device of the model; `auto` takes a GPU if there is one.
        task_class: The task's import path, for checkpoints of a user's own task.

    Raises:
        ConfigError: None or both of checkpoint and adapter are named.
        CheckpointError: They hold no language model, or are damaged.
        BackboneError: The base cannot be loaded, or is not a language model.
    """
    if template is not None:
        chat_template(template)  # a misspelt name shows before minutes go into loading
    if ckpt_path is not None and adapter_dir is not None:
        raise ConfigError("Both --ckpt_path and --adapter_dir are given; name one of them.")
    with _on(_device(device)) as place:
        if ckpt_path is not None:
            found = _from_checkpoint(Path(ckpt_path), backbone, task_class)
        elif adapter_dir is not None:
            found = _from_adapter(resolve(adapter_dir), backbone)
        elif backbone is not None:
            found = _from_base(backbone)
        else:
            raise ConfigError("No model is named: give --ckpt_path, --adapter_dir, or --backbone for a base alone.")
        if not is_quantized(found.model):
            found.model.to(place)
    found.model.eval()
    if template is None:
        return found
    found.tokenizer.chat_template = chat_template(template, bos=begins_with_bos(found.tokenizer))
    return replace(found, answers=True)


def _from_checkpoint(path: Path, backbone: str | None, task_class: str | None) -> LanguageModel:
    run = SavedRun.of_checkpoint(path)
    cls = run.task_class(task_class)
    _refuse_other_tasks(cls, str(path))
    task = run.build(cls, **({} if backbone is None else {"backbone": backbone}))
    model = getattr(task, "model", None)
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise CheckpointError(f"{path} holds a {cls.__name__}, whose model does not generate text.")
    tokenizer = run.load_tokenizer(backbone)
    answers, prefix = run.answers_with(tokenizer), _prefix_of(run)
    return LanguageModel(model, tokenizer, str(path), answers=answers, prefix=prefix)


def _prefix_of(run: SavedRun) -> str:
    """Return the prefix that the data module of a training put before every text."""
    settings: Any = (run.content or {}).get("datamodule_hyper_parameters") or {}
    prefix = settings.get("prefix", "")
    return prefix if isinstance(prefix, str) else ""


def _from_adapter(folder: Path, backbone: str | None) -> LanguageModel:
    run = SavedRun.of_folder(folder)
    base = backbone or _base_of(run)
    tokenizer = run.load_tokenizer(base)
    task = _task_for(base)(backbone=base, adapter=str(folder))
    task.start_from(run)
    task.configure_model()
    return LanguageModel(task.adapted, tokenizer, str(folder), answers=run.answers_with(tokenizer))


def _from_base(backbone: str) -> LanguageModel:
    loaded = load_backbone(backbone, _task_for(backbone).auto_class)
    if loaded.new_modules:
        raise BackboneError(
            f"{backbone!r} is not a language model: its files hold no weights for {', '.join(loaded.new_modules)}."
        )
    return LanguageModel(loaded.model, load_tokenizer(backbone), backbone, answers=_learnt_to_answer(backbone))


def _task_for(backbone: str) -> type[CausalLM | Seq2SeqLM]:
    """Return the task for a base by its config, if transformers knows it."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(locate(backbone), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return CausalLM
    return Seq2SeqLM if config.is_encoder_decoder else CausalLM


def _learnt_to_answer(backbone: str) -> bool:
    """Return whether a base is a merged model that was trained to answer messages."""
    folder = resolve(backbone)
    if not is_adapter_folder(folder):
        return False
    saved = read_manifest(folder).tokenizer
    return saved is not None and saved["answers"] is True


def _base_of(run: SavedRun) -> str:
    """Return the base that an adapter folder names.

    Raises:
        CheckpointError: It names none, or is for another kind of task.
    """
    names, task_type = run.facts.label_names, None if run.peft is None else run.peft.config.task_type
    if names:
        raise CheckpointError(f"{run.path} was trained to tell {len(names)} labels apart, not to write.")
    if task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise CheckpointError(f"{run.path} is for the task {task_type}, not for a language model.")
    if run.facts.base is None:
        raise CheckpointError(f"{run.path} does not say which base it is for; name it with --backbone.")
    return run.facts.base


def _refuse_other_tasks(cls: type[Any], source: str) -> None:
    """Raise CheckpointError if a task's models do not generate text; a user's task may, unless it says otherwise."""
    auto_class = getattr(cls, "auto_class", None)
    writing = (CausalLM.auto_class, Seq2SeqLM.auto_class, AdapterTask.auto_class)
    if issubclass(cls, AdapterTask) and auto_class not in writing:
        raise CheckpointError(
            f"{source} was written by {cls.__name__}, whose model does not write text; generate and chat need a "
            f"checkpoint of {CausalLM.__name__} or {Seq2SeqLM.__name__}."
        )


def _device(name: Device) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    is_there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there[name]:
        raise ConfigError(f"device is {name}, which this machine does not have; leave it out.")
    return torch.device(name)


@contextmanager
def _on(device: torch.device) -> Iterator[torch.device]:
    """Load onto a device within the block, since quantized layers cannot be moved afterwards."""
    with nullcontext() if device.type == "cpu" else device:
        yield device


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:  # noqa: ANN401 - tokenizers share no public base class
    """Return a streamer of transformers that passes on complete words."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            if text:
                write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
