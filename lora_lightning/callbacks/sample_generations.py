"""Sample generations of the model for a few prompts, after each validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import nn

from lora_lightning.adapters.walk import refuse_sharded
from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.callbacks.places import adapted_model, is_trial, run_folder
from lora_lightning.errors import ConfigError
from lora_lightning.keywords import NamesNearest
from lora_lightning.tasks.generation import Example, examples_of, generate

__all__ = ["SampleGenerations"]


class Sample(NamedTuple):
    """A prompt, the answer in the data (None if unknown), and the generated answer."""

    prompt: str
    expected: str | None
    generated: str


class SampleGenerations(NamesNearest, L.Callback):
    """Generate answers to a few prompts after each validation, and show them.

    The answers are printed, appended to `<run folder>/samples.jsonl`, and sent to loggers that take text (TensorBoard,
    Weights & Biases, MLflow). Only rank 0 generates. The model's mode and the run's random state do not change.

    Args:
        prompts: Texts to continue; None takes the first rows of the validation data (of its first set, if it has
            several), whose answers are shown too. If the tokenizer has a chat template, a text is a user's message.
        num_samples: Number of rows to take if no prompts are given.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: 0 decodes greedily; a larger value samples, with the same seed each time.
        filename: Name of the file in the run's folder.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        num_samples: int = 3,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        filename: str = "samples.jsonl",
    ) -> None:
        if prompts is not None and not all(prompts):
            raise ConfigError("SampleGenerations: prompts must hold at least one character each.")
        if num_samples < 1 or max_new_tokens < 1 or temperature < 0:
            raise ConfigError(
                "SampleGenerations: num_samples and max_new_tokens must be at least 1 and temperature at least 0; got "
                f"{num_samples}, {max_new_tokens} and {temperature}."
            )
        self.prompts = prompts
        self.num_samples = num_samples
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.filename = filename
        self._examples: list[Example] = []
        self._tokenizer: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse models that one process cannot run alone."""
        del trainer
        model = adapted_model(pl_module)
        if model is not None:
            refuse_sharded(model, "SampleGenerations")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Discard the rows of the last validation."""
        del trainer, pl_module
        self._examples = []

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the first rows of the data: as prompts if none were given, and to find the end of answers."""
        del pl_module, batch_idx, dataloader_idx
        missing = self.num_samples - len(self._examples)
        if missing > 0 and trainer.is_global_zero:
            self._examples += [example for example in examples_of(batch) if example.prompt][:missing]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate and show."""
        if trainer.sanity_checking:
            return
        folder = run_folder(trainer)  # all ranks ask
        model = adapted_model(pl_module)
        if model is None or not trainer.is_global_zero:
            return
        samples = self._generate(trainer, pl_module, model)
        pl_module.print(render(samples, trainer.global_step))
        if not is_trial(trainer):
            _append(folder / self.filename, samples, trainer.global_step, trainer.current_epoch)
        for logger in trainer.loggers:
            log_text(logger, samples, trainer.global_step)

    def _generate(self, trainer: L.Trainer, pl_module: L.LightningModule, model: nn.Module) -> list[Sample]:
        tokenizer = self._find_tokenizer(trainer, pl_module)
        if self.prompts is None:
            examples = self._examples
        else:
            examples = [Example(encode(prompt, tokenizer), []) for prompt in self.prompts]
        if not examples:
            return []
        learnt = {example.answer[-1] for example in self._examples if example.answer} & {*tokenizer.all_special_ids}
        with trainer.precision_plugin.forward_context():
            answers = generate(
                model,
                [example.prompt for example in examples],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                stop=[token for token in (tokenizer.eos_token_id, *sorted(learnt)) if token is not None],
            )
        shown = self.prompts or [tokenizer.decode(example.prompt, skip_special_tokens=True) for example in examples]
        expected = [tokenizer.decode(example.answer, skip_special_tokens=True) or None for example in examples]
        generated = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return [Sample(*texts) for texts in zip(shown, expected, generated, strict=True)]

    def _find_tokenizer(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        if self._tokenizer is None:
            datamodule: Any = getattr(trainer, "datamodule", None)
            self._tokenizer = getattr(datamodule, "tokenizer", None)
        if self._tokenizer is None or isinstance(self._tokenizer, str):
            name = self._tokenizer or getattr(pl_module, "backbone", None)
            if name is None:
                raise ConfigError("SampleGenerations finds no tokenizer: neither the data nor the task names one.")
            self._tokenizer = load_tokenizer(name)
        return self._tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tokenizer and the rows, which can be found again."""
        return {**self.__dict__, "_tokenizer": None, "_examples": []}


def encode(prompt: str, tokenizer: Any) -> list[int]:  # noqa: ANN401 - a tokenizer of transformers
    """Return a prompt's token ids: as a user's turn if the tokenizer has a chat template, else as plain text."""
    if getattr(tokenizer, "chat_template", None) is None:
        ids = list(tokenizer(prompt)["input_ids"])
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(samples: Sequence[Sample], step: int) -> str:
    """Format samples for the terminal.

    Example:
        >>> print(render([Sample("2 + 2 =", "4", "5")], 10))
        Samples after step 10:
          prompt:    2 + 2 =
          expected:  4
          generated: 5
    """
    lines = [f"Samples after step {step}:"]
    for sample in samples:
        for name, text in sample._asdict().items():
            if text is not None:
                lines.append(f"  {name + ':':<11}" + text.strip().replace("\n", "\n" + " " * 13))
    return "\n".join(lines)


def log_text(logger: Any, samples: Sequence[Sample], step: int) -> None:  # noqa: ANN401 - any of Lightning's loggers
    """Send samples to a logger if it takes text."""
    rows = [[sample.prompt, sample.expected or "", sample.generated] for sample in samples]
    if hasattr(logger, "log_text"):  # Weights & Biases
        logger.log_text("val/samples", columns=list(Sample._fields), data=rows, step=step)
        return
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):  # TensorBoard, which reads Markdown
        cells = [[text.replace("|", r"\|").replace("\n", "<br>") for text in row] for row in rows]
        lines = [" | ".join(Sample._fields), "|".join(["---"] * 3), *(" | ".join(row) for row in cells)]
        experiment.add_text("val/samples", "\n".join(lines), step)
    elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_text(logger.run_id, render(samples, step), f"samples/{step}.txt")


def _append(path: Path, samples: Sequence[Sample], step: int, epoch: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, "epoch": epoch, **sample._asdict()}, ensure_ascii=False) + "\n")
