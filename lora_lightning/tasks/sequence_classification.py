"""Labels or numbers for each text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.checks.monitors import Direction
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.class_weights import ClassWeights
from lora_lightning.tasks.evaluation import EvaluationSets
from lora_lightning.tasks.labelled import LabelledTask
from lora_lightning.tasks.prediction_columns import class_columns
from lora_lightning.tasks.problems import PROBLEMS, ProblemName
from lora_lightning.tasks.step_output import StepOutput

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from lora_lightning.tasks.tables import TableMetric

__all__ = ["SequenceClassification"]

log = logging.getLogger(__name__)
MAX_CLASSES_OF_TABLE = 100


class SequenceClassification(LabelledTask):
    """Classifies or scores texts with the architecture's own classification head, trained beside the adapters.

    Batches hold `input_ids` and `attention_mask` `[batch, length]`, and `labels`. `problem` says what these are:

    - `single_label`: one class for each text, int64 `[batch]`; cross-entropy. Logged are `accuracy` (share of right
      answers) and `f1` (mean over the classes). `predict` returns `label` and `probabilities`.
    - `multi_label`: any number of classes, float32 `[batch, classes]` of 0 and 1; binary cross-entropy. Logged are `f1`
      (mean over the classes), `f1_micro` (over all rows and classes together) and `average_precision` (mean over the
      classes that occur). `predict` returns `labels` and `probabilities`. A label applies if its probability reaches a
      threshold: during `fit`, each validation chooses the one with the largest micro-F1 on the validation rows (of all
      its sets together) and logs it as `val/threshold`; `test` and `predict` use it, also from a checkpoint. Before the
      first validation it is 0.5.
    - `regression`: one or more numbers, float32 `[batch]` or `[batch, targets]`; mean squared error. Logged are `mse`,
      `pearson` and `spearman` (means over the targets). `predict` returns `value`, or `values` by the target's name.

    Each is logged as `val/…` and `test/…`, beside `loss`; training logs `train/loss`. The metrics of `multi_label` and
    `regression` keep the logits of all rows until the end of the epoch.

    Args:
        label_names: Names of the classes by index, or of the targets of `regression`; None takes those that the data
            module finds, and for `regression` else `score`.
        class_weights: Weight of each class in the loss by its name; classes left out weigh 1. `balanced` weighs each
            class by n / (number of classes x its rows). With `multi_label`, the loss is the weighted mean over the
            classes of each class's own loss.
        problem: `single_label`, `multi_label` or `regression`.

    Attributes:
        threshold: The threshold of `multi_label`, scalar float32.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    predictions_format: ClassVar[str] = ".csv"
    threshold: Tensor

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - those of LabelledTask
        problem: ProblemName = "single_label",
        class_weights: ClassWeights | None = None,
        **settings: Any,  # noqa: ANN401 - those of LabelledTask
    ) -> None:
        if problem not in PROBLEMS:
            raise ConfigError(f"problem must be one of {', '.join(PROBLEMS)}, got {problem!r}.")
        if problem == "regression" and class_weights:
            raise ConfigError("class_weights are for classes, and `problem: regression` has none; leave them out.")
        self._problem = PROBLEMS[problem]  # the label names are checked by it
        super().__init__(*args, class_weights=class_weights, **settings)
        self.problem: ProblemName = problem
        # Only a chosen threshold belongs into checkpoints.
        self.register_buffer("threshold", torch.tensor(0.5), persistent=problem == "multi_label")
        self.keep_settings(problem=problem)

    def check_label_names(self, names: list[str]) -> None:
        """Refuse names that no head can be built for.

        Raises:
            ConfigError: They are too few for the problem, or not all different.
        """
        least = self._problem.min_names
        if len(set(names)) < max(len(names), least):
            number = "two different names" if least == 2 else "one name, and all must differ"
            raise ConfigError(f"label_names must be at least {number}, got {names!r}.")

    def find_label_names(self) -> list[str]:
        """Return the names that the data module has found, else those that the problem always has."""
        return super().find_label_names() or list(self._problem.default_names)

    def backbone_config(self) -> dict[str, Any]:
        """Return the label names and the problem, as transformers keeps them."""
        return {**super().backbone_config(), "problem_type": self._problem.problem_type}

    def configure_backbone(self) -> nn.Module:
        """Load the backbone with its classification head, and set its padding token.

        The heads of decoders use the last token that is not padding. The padding token is that of the data module's
        tokenizer, else the config's, else the end token.
        """
        model = super().configure_backbone()
        config: Any = model.config
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is None:
            pad = getattr(config, "pad_token_id", None)
        if pad is None:
            end = getattr(config, "eos_token_id", None)
            pad = end[0] if isinstance(end, list) else end
            log.info("The backbone has no padding token; its end token (%s) pads.", pad)
        config.pad_token_id = pad
        return model

    def compute_loss(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the problem's loss, weighted by class where asked, with logits `[batch, classes]` and labels.

        Raises:
            DataError: The labels are of another kind or shape than the problem's.
        """
        logits, labels = self._logits(batch), batch["labels"]
        return StepOutput(self._problem.loss(logits, labels, self.loss_weights), logits, labels)

    def configure_metrics(self) -> MetricCollection:
        """Return the problem's metrics."""
        return self._problem.metrics(len(self.label_names or []))

    def configure_table(self) -> TableMetric | None:
        """Return the confusion matrix where each text has one of at most a hundred labels."""
        from lora_lightning.tasks.tables import ConfusionTable

        names = self.label_names or []
        if self._problem.name != "single_label" or len(names) > MAX_CLASSES_OF_TABLE:
            return None
        return ConfusionTable(names)

    def logged_metrics(self) -> dict[str, Direction | None]:
        """Return the logged names; with several labels also the threshold."""
        threshold: dict[str, Direction | None] = {"val/threshold": None} if self.problem == "multi_label" else {}
        return super().logged_metrics() | threshold

    def predict(self, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Return the label, the labels or the numbers of each text of a batch; see the class."""
        return self._problem.answers(self._logits(batch), self.label_names or [], self.threshold.item())

    def prediction_columns(self, prediction: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `predicted_label`, `predicted_labels` or `predicted_<name>`, and `probability_<class>` of each."""
        return class_columns(prediction)

    # The threshold of several labels.

    def _start_evaluation(self, sets: EvaluationSets) -> None:
        """Let the metrics of all validation rows of a fit choose the threshold; others use the one that is set."""
        super()._start_evaluation(sets)
        chooses = sets.stage == "val" and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        for prefix in sets.prefixes:
            self._set_threshold_of(prefix, chooses=chooses and sets.is_all(prefix))

    def _end_evaluation(self, sets: EvaluationSets) -> None:
        """Take the threshold that the metrics have chosen, also for the metrics of each set."""
        for metric in self._threshold_metrics(sets.stage)[:1]:
            if sets.stage == "val":
                metric.compute()  # the value is kept for the log
                self.threshold.fill_(metric.threshold)
                self._tell_config()
                self.log("val/threshold", self.threshold, sync_dist=True)
            for prefix in sets.prefixes[:-1]:
                self._set_threshold_of(prefix, chooses=False)
        super()._end_evaluation(sets)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401 - torch's own signature
        """Load an adapter state and, with several labels, the threshold."""
        loaded = super().load_state_dict(state_dict, strict, assign)
        self._tell_config()
        return loaded

    # Helpers.

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return float32 logits `[batch, classes]`."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self(inputs).logits.float()

    def _set_threshold_of(self, prefix: str, *, chooses: bool) -> None:
        for metric in self._threshold_metrics(prefix):
            metric.threshold, metric.chooses = self.threshold.item(), chooses

    def _threshold_metrics(self, prefix: str) -> list[Any]:
        """Return the metrics under a prefix that have a threshold; a subclass may have none."""
        metrics = self._measures(prefix).metrics
        if self.problem != "multi_label" or metrics is None:
            return []
        from lora_lightning.tasks.row_metrics import MultilabelF1

        found = metrics.values(copy_state=False)
        return [metric for metric in found if isinstance(metric, MultilabelF1)]

    def _tell_config(self) -> None:
        """Write the threshold into the model's config, so that a merged model's folder names it."""
        config: Any = getattr(self.model, "config", None)
        if self.problem == "multi_label" and config is not None:
            config.decision_threshold = self.threshold.item()
