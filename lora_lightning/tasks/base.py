"""The LightningModule that all tasks share: a frozen backbone, adapters, and the four step methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import reduce
from typing import Any, ClassVar, Self, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lora_lightning import methods as _known_methods  # noqa: F401 - checkpoints name these classes
from lora_lightning.adapters import (
    AttachReport,
    Method,
    fold,
    is_attached,
    report_of,
    require_calls,
)
from lora_lightning.backbones.attach import attach
from lora_lightning.backbones.load import load_backbone
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.tokenizer_identity import tokenizer_of
from lora_lightning.backbones.view import view_of
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.manifest import class_config
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.checkpoint.starting import StartingAdapter, read_starting_adapter, starting_adapter
from lora_lightning.checks import RunCheck
from lora_lightning.checks.monitors import Direction
from lora_lightning.errors import ConfigError
from lora_lightning.methods import LoRA
from lora_lightning.optim import Optim, build_optimizer, build_schedule
from lora_lightning.resume import ExactResume
from lora_lightning.strategies.fsdp2 import shard_for_trainer
from lora_lightning.tasks.averaging import copy_for_averages
from lora_lightning.tasks.backward import check_offloading, offloaded, recompute
from lora_lightning.tasks.calibration import calibrate_once
from lora_lightning.tasks.evaluated import EvaluatedTask
from lora_lightning.tasks.fusing import may_fuse
from lora_lightning.tasks.loading import class_path_for_cli, refuse_unread_adapter
from lora_lightning.tasks.log_pace import LogPace
from lora_lightning.tasks.prediction_columns import columns_of
from lora_lightning.tasks.quantized import check_quantization, refuse_unfit_trainer
from lora_lightning.tasks.settings import Recomputing, is_plain, labels, methods_from, plain, refuse_packing
from lora_lightning.tasks.step_output import StepOutput, batch_size_of, require_output

__all__ = ["AdapterTask"]

T = TypeVar("T")


class AdapterTask(EvaluatedTask):
    """Fine-tunes adapters on a frozen backbone; subclass it for a task.

    A subclass defines `compute_loss`, and optionally `configure_metrics` and `predict`. To train another model than a
    transformers backbone, override `configure_backbone` and return any module.

    Loss and metrics of validation are logged as `val/<metric>`. With several sets (loaders in a mapping), each set is
    also logged as `val/<set>/<metric>`, and `val/<metric>` covers the rows of all sets. The same holds for `test`.

    Args:
        backbone: Hub name, folder, or `pkg://package/folder`; None if `configure_backbone` is overridden.
        method: The method, or a list of methods; None means `LoRA()`.
        optim: Learning rates, optimizer and schedule; None means `Optim()`.
        dtype: Precision of the frozen weights: `auto` (as stored), `float32`, `bfloat16`, `float16`.
        gradient_checkpointing: What backward recomputes: True recomputes every layer (transformers models; about a
            third more time), `activations` only the nonlinearities before adapted linear layers (a few percent more
            time; see `recompute_activations`).
        offload_activations: Keep saved tensors of at least 1 MiB in host memory until backward needs them (one CUDA
            device or DDP; see `lora_lightning.tasks.offload`). With `gradient_checkpointing: true`, the layers' inputs.
        quantization: Store the backbone's linear layers in 4 or 8 bits (QLoRA); None stores them dense.
        adapter: Folder of an adapter, of this library or of PEFT, to start from instead of a new one. It determines the
            method; a method that is also given must be the same.
        train_norm_statistics: Let batch norms and similar modules use and update the statistics of the training
            batches, which become part of the adapter. Otherwise the base's statistics stay in use.

    Attributes:
        model: The adapted model; None before `configure_model`.
        label_names: Names of the classes by index, or None for tasks without classes.
        evaluation_table: Table of the last evaluation, over all its sets; None if the task has none.
    """

    auto_class: ClassVar[str] = "AutoModel"
    predictions_format: ClassVar[str] = ".jsonl"
    """Suffix of a file of predictions for which no name is given."""

    def __init__(
        self,
        backbone: str | None = None,
        method: Method | list[Method] | None = None,
        optim: Optim | None = None,
        *,
        dtype: str = "auto",
        gradient_checkpointing: Recomputing = False,
        offload_activations: bool = False,
        quantization: Quantization | None = None,
        adapter: str | None = None,
        train_norm_statistics: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.methods = methods_from(method if method is not None else LoRA())
        self.optim = Optim(**optim) if isinstance(optim, Mapping) else optim or Optim()
        self.backbone_dtype = dtype
        self.gradient_checkpointing, self.offload_activations = gradient_checkpointing, offload_activations
        self.quantization = Quantization(**quantization) if isinstance(quantization, Mapping) else quantization
        self.adapter, self.train_norm_statistics = adapter, train_norm_statistics
        self._takes_method_of_adapter = adapter is not None and method is None
        # Settings from a checkpoint are plain. Its weights are loaded later, and the folder may be gone or changed.
        self._takes_state_of_checkpoint = adapter is not None and is_plain(method)
        self._starting_run: SavedRun | None = None
        self.model: nn.Module | None = None
        self.label_names: list[str] | None = None
        self.base_fingerprint: str | None = None
        self._new_modules: tuple[str, ...] = ()
        self._stages_checked: set[str] = set()
        self._is_calibrated = False
        self._log_pace = LogPace()
        specs = [class_config(one) for one in self.methods]
        # Arguments of a subclass are kept without its doing; what it passes to `keep_settings` replaces them.
        self.keep_settings(**vars(self).pop("_plain_arguments"))
        self.keep_settings(
            backbone=backbone,
            method=None if self._takes_method_of_adapter else specs[0] if len(specs) == 1 else specs,
            optim=asdict(self.optim),
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            offload_activations=offload_activations,
            quantization=None if self.quantization is None else asdict(self.quantization),
            adapter=adapter,
            **class_path_for_cli(),
            train_norm_statistics=train_norm_statistics,
        )

    def keep_settings(self, **settings: Any) -> None:  # noqa: ANN401 - checked to be plain
        """Store arguments of `__init__` as plain types, for checkpoints.

        Those that the class was called with are stored already if they are plain types. A subclass adds a plain form of
        its others here, or replaces what differs from the argument.
        """
        self.save_hyperparameters({name: plain(value) for name, value in settings.items()})

    # What a subclass defines or overrides.

    def configure_backbone(self) -> nn.Module:
        """Return the model to adapt; override it to use any module of your own.

        Raises:
            ConfigError: No backbone is named.
            BackboneError: It cannot be loaded.
        """
        if self.backbone is None:
            raise ConfigError(
                f"{type(self).__name__} needs a backbone: a Hub name, a folder, or pkg://package/folder "
                "(or override configure_backbone)."
            )
        loaded = load_backbone(
            self.backbone,
            self.auto_class,
            dtype=self.backbone_dtype,
            quantization=self.quantization,
            keep_dense=[name for method in self.methods for name in method.modules_to_save or ()],
            **self.backbone_config(),
        )
        self._new_modules = loaded.new_modules
        if loaded.storage is not None:
            rank_zero_info(loaded.storage)
        return loaded.model

    def backbone_config(self) -> dict[str, Any]:
        """Return overrides of the backbone's config, such as its number of labels."""
        return {}

    def trained_modules(self, model: nn.Module) -> list[str]:
        """Return the modules to train as full copies: the head, and modules without weights in the backbone's files."""
        return list(dict.fromkeys([*view_of(model).head_paths(), *self._new_modules]))

    def compute_loss(self, batch: Any) -> StepOutput:  # noqa: ANN401 - the data module's own type
        """Return the loss of a batch, and what the metrics need."""
        del batch
        raise TypeError(f"{type(self).__name__} must define compute_loss(self, batch) -> StepOutput.")

    def logged_metrics(self) -> dict[str, Direction | None]:
        """Return the names that a fit or test logs, each with the better direction (`min`, `max`, None if unknown).

        A callback that monitors another name is refused before the first step. Override it to add what a subclass logs:
        `return {**super().logged_metrics(), "val/quality": "max"}`. The names of named sets follow from these.
        """
        penalties = [label for one, label in zip(self.methods, labels(self.methods), strict=True) if one.penalizes]
        names: dict[str, Direction | None] = {"train/loss": "min"}
        names |= dict.fromkeys([f"train/{label}_penalty" for label in penalties], "min")
        found = self._measured()
        return names | {f"{stage}/{name}": found[name] for stage in ("val", "test") for name in found}

    def predict(self, batch: Any) -> Any:  # noqa: ANN401 - the task's own type
        """Return the predictions for a batch without targets."""
        return self(batch)

    def prediction_columns(self, prediction: Any) -> Mapping[str, Any]:  # noqa: ANN401 - the task's own type
        """Return the columns of a file of predictions for the prediction of one row.

        Args:
            prediction: What `predict` returned for the row, in plain types.
        """
        return columns_of(prediction)

    def forward(self, batch: Mapping[str, Any]) -> Any:  # noqa: ANN401 - the model's own output
        """Call the adapted model with a batch's entries."""
        return self.adapted(**batch)

    # What Lightning calls.

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks that every run gets, from Python too, without those that the trainer already has."""
        given: list[L.Callback] = getattr(self.trainer, "callbacks", [])
        return [kind() for kind in (RunCheck, ExactResume) if not any(isinstance(one, kind) for one in given)]

    @property
    def adapted(self) -> nn.Module:
        """The adapted model.

        Raises:
            ConfigError: `configure_model` has not run yet.
        """
        if self.model is None:
            raise ConfigError("The model is not built yet; call configure_model() first (the Trainer does).")
        return self.model

    @property
    def report(self) -> AttachReport | None:
        """The current report of what trains, and where; None before `configure_model`."""
        return None if self.model is None else report_of(self.model)

    def configure_model(self) -> None:
        """Load the backbone, freeze it, attach the adapters, shard it under FSDP2; does nothing the second time."""
        check_offloading(self)
        if self.model is not None:
            # It may have been built before there was a Trainer.
            shard_for_trainer(self.model, self.base_fingerprint, self._trainer)
            return
        if self.quantization is not None and self._trainer is not None:
            refuse_unfit_trainer(self._trainer)  # before minutes go into loading
        model: Any = self.configure_backbone()
        if not isinstance(model, nn.Module):
            returned = f"configure_backbone of {type(self).__name__} returned {type(model).__name__}"
            raise ConfigError(f"{returned}; return the model to adapt, a torch.nn.Module.")
        self.check_trained(self._new_modules)
        if is_attached(model):
            raise ConfigError("configure_backbone returned a model with adapters; return the bare model.")
        check_quantization(model, self.quantization, self._trainer)
        start = self._starting_adapter(model)
        refuse_packing(self.methods, getattr(self._trainer, "datamodule", None))
        saved, statistics = self.trained_modules(model), self.train_norm_statistics
        attach(model, self.methods, modules_to_save=saved, train_norm_statistics=statistics)
        if start is not None:
            start.check_labels(self.label_names, model)
            start.load_into(model, self.methods, tokenizer_of(self._trainer))
            start.load_own(self)
            self._is_calibrated = True  # to look at data again would undo what the adapter has learned
        recompute(model, self.gradient_checkpointing)
        self.model = model.train()
        self.base_fingerprint = fingerprint(model)
        for stage in ("val", "test"):
            self._add_measures(stage, f"{stage}_metrics")
        copy_for_averages(self)
        shard_for_trainer(self.model, self.base_fingerprint, self._trainer)

    def to(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 - torch's own signature
        """Move the module; in a fit, then let methods calibrate on data.

        Lightning moves the module after loading a checkpoint and before optimizer and DDP see the parameters. Methods
        that change their parameters by the data need this moment, for which Lightning has no hook.
        """
        super().to(*args, **kwargs)
        calibrate_once(self)
        return self

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """Build the optimizer over the role groups, and the schedule stepped once per optimizer step."""
        optimizer = build_optimizer(self, self.optim, may_fuse=may_fuse(self.trainer))
        scheduler = build_schedule(optimizer, self.optim, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401 - the data module's own type
        """Return the loss of a batch, with the methods' penalties, and log it at logging steps."""
        del batch_idx
        output = self._checked("train", self.compute_loss, batch)
        values = {"loss": require_output(output, type(self).__name__, trains=True).loss}
        for method, label in zip(self.methods, labels(self.methods), strict=True):
            penalty = method.extra_loss(self.adapted)
            if penalty is not None:
                values[f"{label}_penalty"] = penalty
        self._log_pace.log(self, values, batch_size_of(batch))
        return reduce(torch.add, values.values())

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # noqa: ANN401 - the data module's own type
        """Return the task's predictions for a batch."""
        del batch_idx, dataloader_idx
        return self.predict(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let methods act on the gradients."""
        del optimizer
        for method in self.methods:
            method.before_step(self.adapted, self.trainer.global_step, self._total_steps())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Step the optimizer, then let methods act on the updated adapters."""
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        for method in self.methods:
            method.after_step(self.adapted, step, self._total_steps())

    def fold(self) -> None:
        """Remove what only training needs (the encoders of prompt methods); the outputs stay the same."""
        fold(self.adapted)

    # Helpers.

    def _starting_adapter(self, model: nn.Module) -> StartingAdapter | None:
        """Read the adapter to start from, if there is one and no checkpoint is going to be loaded."""
        if self.adapter is None:
            return None
        if self._takes_state_of_checkpoint and not self._takes_method_of_adapter:
            return None
        run, self._starting_run = self._starting_run, None
        start = read_starting_adapter(model, self.adapter) if run is None else starting_adapter(run, model)
        if self._takes_method_of_adapter:
            self.methods = methods_from(start.methods)
            self.keep_settings(method=start.methods[0] if len(start.methods) == 1 else start.methods)
            self._takes_method_of_adapter = False
        return start

    def _checked(self, stage: str, compute: Callable[[Any], T], batch: Any) -> T:  # noqa: ANN401 - the data module's own type
        """Call `compute` on a batch; on the first batch of a stage, check that every adapter is called."""
        if self._takes_state_of_checkpoint:
            refuse_unread_adapter(self.adapter)
        compute = offloaded(self, compute) if stage == "train" else compute
        if stage in self._stages_checked or hasattr(self.model, "_orig_mod"):
            return compute(batch)
        self._stages_checked.add(stage)
        with require_calls(self.adapted, of_all=False):
            return compute(batch)

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        return int(total) if total != float("inf") else -1
