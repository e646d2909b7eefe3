"""Causal language models: trained to continue texts or to answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.view import input_embeddings, output_embeddings
from lora_lightning.adapters.walk import unwrap
from lora_lightning.backbones.heads.output_head import OutputHead, find_output_head, without_cache
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.tasks.generation import examples_of, generate, max_positions
from lora_lightning.tasks.per_token import PerTokenTask
from lora_lightning.tasks.prediction_columns import text_columns
from lora_lightning.tasks.token_loss import CHUNK, IGNORED, TokenSums, chunked_token_loss, supervised
from lora_lightning.texts.saved_tokenizer import stop_ids

__all__ = ["CausalLM"]


class CausalLM(PerTokenTask):
    """Fine-tunes a causal language model on the tokens that its data supervise.

    Batches hold `input_ids` and `labels` `[batch, length]`: labels are not shifted (the task shifts them) and are -100
    at tokens that are not trained on. Other entries are passed to the model: `attention_mask` for padding on either
    side; `position_ids` that restart at 0 in each packed document.

    The logits are never all in memory: the loss is computed in chunks of supervised positions, with any output head,
    trained or frozen. Logged: see `PerTokenTask`.

    Args:
        loss_chunk_size: Tokens whose logits are in memory at one time; a larger value takes more memory and, on a GPU,
            less time.
        max_new_tokens: Maximum number of tokens that `predict` generates.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - those of AdapterTask
        loss_chunk_size: int = CHUNK,
        max_new_tokens: int = 64,
        **settings: Any,  # noqa: ANN401 - those of AdapterTask
    ) -> None:
        super().__init__(*args, **settings)
        for name, value in {"loss_chunk_size": loss_chunk_size, "max_new_tokens": max_new_tokens}.items():
            if value < 1:
                raise ConfigError(f"CausalLM: {name} must be at least 1, got {value}.")
        self.loss_chunk_size, self.max_new_tokens = loss_chunk_size, max_new_tokens
        self._parts: tuple[nn.Module | None, OutputHead | None] | None = None
        self.keep_settings(loss_chunk_size=loss_chunk_size, max_new_tokens=max_new_tokens)

    def trained_modules(self, model: nn.Module) -> list[str]:
        """Return the modules without weights in the backbone's files; a pretrained head stays frozen."""
        del model
        return list(self._new_modules)

    def token_sums(self, batch: Mapping[str, Any]) -> TokenSums:
        """Return the cross-entropies of a batch's supervised tokens, summed.

        Raises:
            DataError: The batch does not fit the model, or has no labels.
        """
        check_batch(batch, self.adapted)
        if "labels" not in batch:
            raise DataError(f"CausalLM needs labels to compute a loss; the batch holds {', '.join(sorted(batch))}.")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        positions, targets = supervised(batch)
        parts = self._output_head()
        if parts is None:
            logits = self({**inputs, **without_cache(unwrap(self.adapted))}).logits
            return chunked_token_loss(_rows(logits, positions), targets, nn.Identity(), chunk_size=self.loss_chunk_size)
        hidden = _rows(parts.hidden_states(inputs), positions)
        return chunked_token_loss(hidden, targets, parts.head, parts.logit_map, chunk_size=self.loss_chunk_size)

    def predict(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Generate from the prompt of each row: the tokens before the first supervised one.

        Returns:
            For each row `prompt_ids` and `generated_ids`, and as texts `prompt` and `generated` if the data module has
            a tokenizer.

        Raises:
            DataError: The batch does not fit the model.
        """
        check_batch(batch, self.adapted)
        tokenizer: Any = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        prompts = [example.prompt for example in examples_of(batch)]
        stop = [] if tokenizer is None else stop_ids(tokenizer, is_chat=bool(tokenizer.chat_template))
        answers = generate(self.adapted, prompts, max_new_tokens=self.max_new_tokens, stop=stop)
        rows = [
            {"prompt_ids": list(prompt), "generated_ids": answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if tokenizer is None:
            return rows
        return [
            {
                "prompt": tokenizer.decode(row["prompt_ids"]),
                "generated": tokenizer.decode(row["generated_ids"], skip_special_tokens=True),
                **row,
            }
            for row in rows
        ]

    def prediction_columns(self, prediction: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the text as `generated` and the prompt as `prompt_text`."""
        return text_columns(prediction)

    def _checked(self, stage: str, *args: Any) -> Any:  # noqa: ANN401 - as the base has it
        self._output_head()  # its trial calls every adapter, which must not count as a call in the loss
        return super()._checked(stage, *args)

    def _output_head(self) -> OutputHead | None:
        """Return the model's modules around the logits; cached until the head is replaced."""
        model: Any = unwrap(self.adapted)
        head = output_embeddings(model)
        if self._parts is None or self._parts[0] is not head:
            self._parts = (head, find_output_head(model))
        return self._parts[1]


def check_batch(batch: Mapping[str, Any], model: nn.Module) -> None:
    """Raise DataError if a batch does not fit a causal language model.

    Args:
        batch: The batch.
        model: The model.

    Raises:
        DataError: Token ids or labels are missing, lie beyond the vocabulary, or a row is longer than the model takes.
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        raise DataError(f"CausalLM needs token ids [batch, length] under input_ids; the batch holds {sorted(batch)}.")
    if labels is not None and labels.shape != ids.shape:
        raise DataError(f"labels {list(labels.shape)} must have the shape of input_ids {list(ids.shape)}.")
    bare: Any = unwrap(model)
    embedding: Any = input_embeddings(bare)
    if hasattr(embedding, "weight"):
        size = len(embedding.weight)
        _check_range("input_ids", ids, size)
        if labels is not None:
            _check_range("labels", labels[labels != IGNORED], size)
    positions = batch.get("position_ids")
    longest = ids.shape[1] if not isinstance(positions, Tensor) else int(positions.max()) + 1
    if longest > max_positions(bare):
        raise DataError(
            f"A row has {longest} tokens, and this model takes {max_positions(bare)}; set a smaller max_length in the "
            "data."
        )


def _check_range(name: str, ids: Tensor, size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise DataError(
            f"{name} holds token {wrong}, and the model's vocabulary ends at {size - 1}: the tokenizer belongs to "
            "another model, or has tokens that the model was never given."
        )


def _rows(tensor: Tensor, positions: Tensor) -> Tensor:
    """Return rows `[N, width]` of a tensor `[batch, length, width]`."""
    return torch.index_select(tensor.flatten(0, 1), 0, positions)
