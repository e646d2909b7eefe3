"""Encoder-decoder models that learn to write a target text for a source text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.adapters.view import output_embeddings
from lora_lightning.adapters.walk import unwrap
from lora_lightning.backbones.heads.decoder_head import decoder_states, find_decoder_head
from lora_lightning.backbones.heads.output_head import without_cache
from lora_lightning.checks.monitors import Direction
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.strategies.facts import facts_of
from lora_lightning.tasks.evaluation import EvaluationSets
from lora_lightning.tasks.generation import answer
from lora_lightning.tasks.per_token import PerTokenTask
from lora_lightning.tasks.prediction_columns import text_columns
from lora_lightning.tasks.text_overlap import Overlap, overlap
from lora_lightning.tasks.token_loss import CHUNK, IGNORED, TokenSums, chunked_token_loss

__all__ = ["Seq2SeqLM"]

_NOT_FOR_THE_ENCODER = ("labels", "decoder_input_ids", "decoder_attention_mask")


class Seq2SeqLM(PerTokenTask):
    """Fine-tunes a model such as T5 or BART to write a target text for a source text.

    Batches hold `input_ids` and `attention_mask` `[batch, source length]`, and `labels` `[batch, target length]`: the
    target's tokens with its end token, -100 where padded, padding on the right. The architecture derives the decoder's
    input from the labels, unless the batch holds `decoder_input_ids`.

    The loss is the mean over target tokens, exact over accumulated batches and ranks. If the output head can be called
    alone, the logits are computed in chunks. Logged: see `PerTokenTask`; for the first rows of each evaluation also
    `val/…` and `test/…` of `exact_match`, `rouge1`, `rouge2` and `rougeL` of the generated answers, means over these
    rows; see `lora_lightning.tasks.text_overlap`. Without a tokenizer in the data module, token ids count as words.

    Args:
        loss_chunk_size: Tokens whose logits are in memory at one time; a larger value takes more memory and, on a GPU,
            less time.
        max_new_tokens: Maximum number of tokens of an answer.
        num_beams: Number of beams; 1 decodes greedily.
        num_generated: Number of rows of the test, and of each validation set, for which answers are generated, over all
            ranks; 0 generates none.
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - those of AdapterTask
        loss_chunk_size: int = CHUNK,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        num_generated: int = 64,
        **settings: Any,  # noqa: ANN401 - those of AdapterTask
    ) -> None:
        super().__init__(*args, **settings)
        own = {
            "loss_chunk_size": loss_chunk_size,
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "num_generated": num_generated,
        }
        for name, value in own.items():
            least = 0 if name == "num_generated" else 1
            if value < least:
                raise ConfigError(f"Seq2SeqLM: {name} must be at least {least}, got {value}.")
        self.loss_chunk_size, self.max_new_tokens = loss_chunk_size, max_new_tokens
        self.num_beams, self.num_generated = num_beams, num_generated
        self.keep_settings(**own)
        self._found: tuple[nn.Module | None, nn.Module | None] | None = None
        self._overlaps: dict[str, list[Overlap]] = defaultdict(list)
        self._has_told_sharded = False

    def trained_modules(self, model: nn.Module) -> list[str]:
        """Return the modules without weights in the backbone's files; a pretrained head stays frozen."""
        del model
        return list(self._new_modules)

    def token_sums(self, batch: Mapping[str, Any]) -> TokenSums:
        """Return the cross-entropies of a batch's target tokens, summed.

        Raises:
            DataError: The batch does not fit the model, or has no labels.
        """
        inputs = self._with_decoder_inputs(batch)
        labels: Tensor = batch["labels"]
        positions = (labels != IGNORED).flatten().nonzero().flatten()
        targets = labels.flatten()[positions]
        head = self._output_head()
        if head is None:
            states = self({**inputs, **without_cache(unwrap(self.adapted))}).logits
        else:
            states = decoder_states(self.adapted, head, inputs)
        rows = torch.index_select(states.flatten(0, 1), 0, positions)
        return chunked_token_loss(rows, targets, head or nn.Identity(), chunk_size=self.loss_chunk_size)

    def generation_settings(self) -> dict[str, Any]:
        """Return the generation settings of evaluations, which are exported with the model."""
        return {"max_new_tokens": self.max_new_tokens, "max_length": None, "num_beams": self.num_beams}

    def predict(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the answer to each source text.

        Returns:
            For each row `source_ids` and `generated_ids`, and as texts `source` and `generated` if the data module has
            a tokenizer.
        """
        answers, mask = self._answers(batch), batch.get("attention_mask")
        sources = [
            ids[mask[row] > 0].tolist() if mask is not None else ids.tolist()
            for row, ids in enumerate(batch["input_ids"])
        ]
        rows = [{"source_ids": source, "generated_ids": ids} for source, ids in zip(sources, answers, strict=True)]
        if self._tokenizer() is None:
            return rows
        return [
            {"source": self._text(row["source_ids"]), "generated": self._text(row["generated_ids"]), **row}
            for row in rows
        ]

    def prediction_columns(self, prediction: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the text as `generated`."""
        return text_columns(prediction)

    # Helpers.

    def _checked(self, stage: str, *args: Any) -> Any:  # noqa: ANN401 - as the base has it
        self._output_head()  # its trial calls every adapter, which must not count as a call in the loss
        return super()._checked(stage, *args)

    def _output_head(self) -> nn.Module | None:
        """Return the model's output head; cached until the head is replaced."""
        model: Any = unwrap(self.adapted)
        head = output_embeddings(model)
        if self._found is None or self._found[0] is not head:
            self._found = (head, find_decoder_head(self.adapted))
        return self._found[1]

    def _with_decoder_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch without its labels, with the decoder's input."""
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
            raise DataError(
                f"Seq2SeqLM needs token ids [batch, length] under input_ids; the batch holds {sorted(batch)}."
            )
        if not isinstance(labels, Tensor) or labels.dim() != 2 or len(labels) != len(ids):
            raise DataError(
                f"Seq2SeqLM needs labels [batch, target length] for its {len(ids)} rows; the batch holds "
                f"{sorted(batch)}{f', labels of shape {list(labels.shape)}' if isinstance(labels, Tensor) else ''}."
            )
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if "decoder_input_ids" not in inputs:
            shift: Any = getattr(unwrap(self.adapted), "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise DataError(
                    f"{type(unwrap(self.adapted)).__name__} does not say how its decoder's input is made of labels; "
                    "put decoder_input_ids into the batches."
                )
            inputs["decoder_input_ids"] = shift(labels)
        return inputs

    def _start_evaluation(self, sets: EvaluationSets) -> None:
        super()._start_evaluation(sets)
        self._overlaps.clear()

    def _evaluate(self, batch: Any, sets: EvaluationSets, index: int) -> None:  # noqa: ANN401 - the data module's own type
        super()._evaluate(batch, sets, index)
        prefixes = sets.prefixes_of(index)
        share = -(-self.num_generated // self.trainer.world_size)
        num_answered = len(self._overlaps[prefixes[0]])
        num_rows = min(share - num_answered, len(batch["input_ids"]))
        if num_rows < 1 or self._is_sharded():
            return
        part = {name: value[:num_rows] for name, value in batch.items() if isinstance(value, Tensor)}
        for ids, labels in zip(self._answers(part), part["labels"].tolist(), strict=True):
            target = [token for token in labels if token != IGNORED]
            found = overlap(self._text(ids), self._text(target))
            for prefix in prefixes:
                self._overlaps[prefix].append(found)

    def _measured(self) -> dict[str, Direction | None]:
        overlaps: dict[str, Direction | None] = dict.fromkeys(Overlap._fields if self.num_generated else (), "max")
        return super()._measured() | overlaps

    def _values_of(self, prefix: str) -> dict[str, Any]:
        values = super()._values_of(prefix)
        if self.num_generated == 0:
            return values
        found = [[1.0, *one] for one in self._overlaps[prefix]]
        sums = torch.tensor(found or [[0.0] * 5], device=self.device).sum(0)
        num_rows, *totals = self._over_ranks(sums).tolist()
        if num_rows:
            values |= {name: total / num_rows for name, total in zip(Overlap._fields, totals, strict=True)}
        return values

    def _is_sharded(self) -> bool:
        """Return whether parameters are sharded, so that ranks with answers of different lengths would block."""
        sharded = facts_of(self.trainer).shards
        if sharded and not self._has_told_sharded:
            self._has_told_sharded = True
            rank_zero_warn("The model's parameters are sharded, so nothing is generated: no exact_match and no ROUGE.")
        return sharded

    def _answers(self, batch: Mapping[str, Any]) -> list[list[int]]:
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_ENCODER}
        return answer(self.adapted, inputs, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)

    def _tokenizer(self) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        return getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)

    def _text(self, ids: list[int]) -> str:
        tokenizer = self._tokenizer()
        if tokenizer is not None:
            return tokenizer.decode(ids, skip_special_tokens=True)
        ends = getattr(unwrap(self.adapted).config, "eos_token_id", None)
        return " ".join(str(token) for token in ids if token != ends)
