"""One tag for each word: names, parts of speech, chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_lightning.errors import DataError
from lora_lightning.tasks.entities import entities, has_prefixes
from lora_lightning.tasks.labelled import LabelledTask
from lora_lightning.tasks.prediction_columns import columns_of
from lora_lightning.tasks.step_output import StepOutput
from lora_lightning.tasks.token_loss import IGNORED

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from lora_lightning.tasks.tables import TableMetric

__all__ = ["TokenClassification"]

_NOT_FOR_THE_MODEL = ("labels", "words", "sentences")


class TokenClassification(LabelledTask):
    """Tags the words of texts with the architecture's own token head, trained beside the adapters.

    Batches hold `input_ids` and `attention_mask` `[batch, length]`, and `labels` `[batch, length]`: the index of a tag
    at the tokens that are learnt (usually the first one of each word), -100 elsewhere. With `words` `[batch, length]`,
    `predict` knows where words begin: a word's index in its sentence at its first token, -1 elsewhere. With `sentences`
    `[batch]`, it joins the rows of one sentence in their order.

    Logged: `train/loss`, and `val/…` and `test/…` of `loss`, `accuracy` (share of labelled tokens that are right), and
    `f1`, `precision` and `recall` of entities that are found exactly, over all types together. With tags without
    prefixes (`NOUN`) each token is an entity of its own. See `lora_lightning.tasks.entities`.
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    def compute_loss(self, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the mean cross-entropy of labelled tokens, weighted by class where asked; 0 where there are none.

        Returns:
            The loss, predicted tags `[batch, length]`, and labels `[batch, length]`.

        Raises:
            DataError: The labels are missing, or are not of the shape of the tokens.
        """
        labels, ids = batch.get("labels"), batch["input_ids"]
        if labels is None or labels.shape != ids.shape:
            came = "none" if labels is None else str(list(labels.shape))
            raise DataError(
                f"TokenClassification needs labels of the shape of input_ids, {list(ids.shape)}; got {came}."
            )
        logits = self._logits(batch)
        weights = self.loss_weights
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weights, ignore_index=IGNORED, reduction="sum")
        labelled = labels != IGNORED
        weight = labelled.sum() if weights is None else (weights[labels.clamp_min(0)] * labelled).sum()
        # Nothing labelled, or nothing that weighs anything: the sum is 0 then.
        return StepOutput(total / torch.where(weight > 0, weight, 1), logits.argmax(-1), labels)

    def configure_metrics(self) -> MetricCollection:
        """Return accuracy over tokens, and F1, precision and recall over entities."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        from lora_lightning.tasks.entities import EntityF1, EntityPrecision, EntityRecall

        names = self.label_names or []
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(len(names), average="micro", ignore_index=IGNORED),
                "f1": EntityF1(names),
                "precision": EntityPrecision(names),
                "recall": EntityRecall(names),
            }
        )

    def configure_table(self) -> TableMetric:
        """Return the counts of entities by type."""
        from lora_lightning.tasks.tables import EntityTable

        return EntityTable(self.label_names or [])

    def predict(self, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return the words of each text with their tags, and the entities.

        Returns:
            For each text `tags` and `entities` (each with `type`, `start` and `end`, the index of its first word and of
            the word after its last); if the batch holds `words`, the indices of the tagged words; if the data module
            has a tokenizer, `tokens` (the words as it spells them) and the `text` of each entity.
        """
        names = self.label_names or []
        tokenizer: Any = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        guesses = self._logits(batch).argmax(-1).tolist()
        sentences = batch["sentences"].tolist() if "sentences" in batch else range(len(guesses))
        word_indices = _indices_of(batch)
        tags_of: dict[int, list[str]] = {}
        indices_of: dict[int, list[int]] = {}
        words_of: dict[int, list[str]] = {}
        rows = zip(sentences, batch["input_ids"].tolist(), *_words_of(batch), guesses, word_indices, strict=True)
        for sentence, ids, starts, end, guess, indices in rows:
            tags = [names[guess[place]] for place in starts]
            tags_of.setdefault(sentence, []).extend(tags)
            indices_of.setdefault(sentence, []).extend(indices)
            if tokenizer is not None:
                words_of.setdefault(sentence, []).extend(_spelt(tokenizer, ids, starts, end))
        described = [self._described(tags, words_of.get(sentence)) for sentence, tags in tags_of.items()]
        if "words" not in batch:
            return described
        return [{**one, "words": indices} for one, indices in zip(described, indices_of.values(), strict=True)]

    def prediction_columns(self, prediction: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `predicted_tags` and `predicted_entities`; `predicted_tokens` where the input's words are unknown."""
        return columns_of({name: value for name, value in prediction.items() if name != "words"})

    def _described(self, tags: list[str], words: list[str] | None) -> dict[str, Any]:
        """Return the tags of a text with their entities, and where its words are known, these too."""
        found = entities(tags, prefixed=has_prefixes(self.label_names or []))
        if words is None:
            return {"tags": tags, "entities": [entity._asdict() for entity in found]}
        spelt = [{**entity._asdict(), "text": " ".join(words[entity.start : entity.end])} for entity in found]
        return {"tokens": words, "tags": tags, "entities": spelt}

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return float32 logits `[batch, length, tags]`."""
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}
        return self(inputs).logits.float()


def _words_of(batch: Mapping[str, Tensor]) -> tuple[list[list[int]], list[int]]:
    """Return the indices of the tokens that represent words, and the index after the last token, of each row."""
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    labelled = batch["labels"] != IGNORED if "labels" in batch else mask > 0
    is_word = batch["words"] >= 0 if "words" in batch else labelled
    starts = [row.nonzero().flatten().tolist() for row in is_word]
    return starts, [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]


def _indices_of(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the index in its sentence of each word that has a token, row by row; nothing if the batch has none."""
    if "words" not in batch:
        return [[] for _ in batch["input_ids"]]
    return [row[row >= 0].tolist() for row in batch["words"]]


def _spelt(tokenizer: Any, ids: list[int], starts: list[int], end: int) -> list[str]:  # noqa: ANN401 - tokenizers share no public base class
    """Return the words of a row, from the first token of each to that of the next, as the tokenizer spells them."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    parts = zip(starts, [*starts[1:], end], strict=True)
    return [tokenizer.decode([one for one in ids[a:b] if one not in special]).strip() for a, b in parts]
