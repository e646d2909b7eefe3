"""Lightning's ModelCheckpoint, with an adapter folder beside every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.adapters import (
    adapter_names,
    adapter_state_dict,
    attached_methods,
    folded_state_dict,
    gathered,
)
from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.walk import unwrap
from lora_lightning.backbones.tokenizer_identity import tokenizer_fingerprint, tokenizer_of
from lora_lightning.callbacks.checkpoint_io import AdapterCheckpointIO
from lora_lightning.callbacks.places import adapted_model, is_trial
from lora_lightning.checkpoint import RunFacts, fingerprint, write_adapter_folder
from lora_lightning.checkpoint.complete import newest_complete, recover
from lora_lightning.checkpoint.files import remove_folder
from lora_lightning.checkpoint.folder import check_finite, fill_adapter_folder, is_adapter_folder
from lora_lightning.checkpoint.manifest import FileRecord
from lora_lightning.checkpoint.own_state import own_entries, own_file
from lora_lightning.checkpoint.pair import Fill, folder_of, replace_link
from lora_lightning.checkpoint.saved_run import generation_settings_of
from lora_lightning.errors import CheckpointError
from lora_lightning.finetuning import is_finetuned
from lora_lightning.finetuning.state import own_state, reduced
from lora_lightning.keywords import ForwardsSettings
from lora_lightning.tasks.averaging import averaged_task
from lora_lightning.texts.files import text_files
from lora_lightning.texts.saved_tokenizer import SavedTokenizer

__all__ = ["AdapterCheckpoint"]


class AdapterCheckpoint(ForwardsSettings, ModelCheckpoint):
    """Save checkpoints of the adapter; each `<name>.ckpt` has a folder `<name>/` with the adapter for other tools.

    Training resumes from the `.ckpt`. The folder is in PEFT's format if PEFT can express the adapter, and holds a
    manifest; it is written and removed with its `.ckpt`. A state with NaN or infinite weights is never saved, so that
    the previous checkpoint stays the last one. A NaN or infinite value of `monitor` never counts as one of the best.

    Args:
        dirpath: Folder of the checkpoints; None means `checkpoints` in the run's folder.
        filename: Name pattern, such as `{epoch}-{step}` (the default).
        monitor: Name of the metric that decides which checkpoints are kept; None keeps the newest.
        verbose: Whether to log each save.
        save_last: Whether to write `last.ckpt` at every save, also if the metric is not among the best (Lightning's
            callback does not update it then); `link` makes it a symbolic link to the newest checkpoint that was kept.
        save_top_k: Number of best checkpoints to keep; -1 keeps all, 0 none but `last`.
        save_on_exception: Whether an exception or Ctrl-C saves a checkpoint.
        save_weights_only: Whether to omit optimizer and loops, so that training cannot resume from it.
        mode: Whether a smaller (`min`) or a larger (`max`) value of `monitor` is better.
        auto_insert_metric_name: Whether the file name contains the names of metrics.
        every_n_train_steps: Save every so many optimizer steps; excludes the next two.
        train_time_interval: Save at this interval of time.
        every_n_epochs: Save every so many epochs; 1 if no interval is given.
        save_on_train_epoch_end: Whether to save before validation instead of after it.
        enable_version_counter: Whether a name that is taken gets the suffix `-v1`; False overwrites.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        *,
        save_last: bool | Literal["link"] | None = True,
        **settings: Any,  # noqa: ANN401 - those of ModelCheckpoint
    ) -> None:
        super().__init__(dirpath, filename, save_last=save_last, **settings)
        self._base_fingerprint: str | None = None
        self._step_of_last: int | None = None
        self._written: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Use a checkpoint plugin that writes atomically and checks what it reads."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AdapterCheckpointIO()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if no adapter folders can be written, and take the fingerprint of the base."""
        self._base_fingerprint = self._step_of_last = None
        model = adapted_model(pl_module)
        if model is None:
            rank_zero_warn("The module has no adapters attached, so AdapterCheckpoint saves plain .ckpt files only.")
        elif not attached_methods(model):
            rank_zero_warn(
                "Several submodules have adapters, which one adapter folder cannot hold, so AdapterCheckpoint saves "
                "plain .ckpt files only."
            )
        elif len(adapter_names(model)) > 1:
            rank_zero_warn(
                f"The model has the adapters {', '.join(adapter_names(model))}, which one adapter folder cannot hold: "
                "the .ckpt files hold them all, and AdapterCheckpoint saves no folders. Write them with "
                "export_peft(model, folder, name=...)."
            )
        elif not writes_folders(pl_module, model):
            rank_zero_warn(
                "The model is sharded over processes without a fingerprint of its base (an AdapterTask takes it under "
                "FSDP2), so AdapterCheckpoint saves no adapter folders."
            )
        elif trainer.is_global_zero:
            self._base_fingerprint = getattr(pl_module, "base_fingerprint", None) or fingerprint(model)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clean up after a killed run: in the folder to save in, and in that of the checkpoint to resume from."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and not is_trial(trainer):
            folders = {
                Path(path) for path in (self.dirpath, trainer.ckpt_path and Path(trainer.ckpt_path).parent) if path
            }
            for folder in folders:
                recover(folder)
        for path in self._superseded(trainer):
            self._remove_checkpoint(trainer, path)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the checkpoints that this run has written and not removed yet."""
        return {**super().state_dict(), "written": list(self._written)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint if the folder is the same."""
        super().load_state_dict(state_dict)
        if state_dict.get("dirpath") == self.dirpath:
            self._written = list(state_dict.get("written", []))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ensure that there is a last checkpoint, except in a `fast_dev_run`."""
        if not is_trial(trainer):
            super().on_train_end(trainer, pl_module)

    def save_now(self, trainer: L.Trainer) -> str:
        """Save the current step as `last.ckpt`, whatever `save_last` says; all ranks must call it.

        Returns:
            The path of the checkpoint.
        """
        kept, self.save_last = self.save_last, True
        try:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self.save_last = kept
        return self.last_model_path

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Return whether a value of `monitor` is among the best; NaN and infinite values never are."""
        is_finite = current is None or bool(torch.isfinite(current))
        if not trainer.strategy.reduce_boolean_decision(is_finite, all=True):
            rank_zero_warn(
                f"{self.monitor} is {current} at step {trainer.global_step}, so this step is not among the best ones."
            )
            return False
        return super().check_monitor_top_k(trainer, current)

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_last is True and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last is True and self._step_of_last == trainer.global_step:
            return
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._step_of_last = trainer.global_step

    def _superseded(self, trainer: L.Trainer) -> list[str]:
        """Return the checkpoints that a killed run had replaced with better or newer ones but not removed."""
        if self.save_top_k == -1:
            return []
        kept = {self.best_model_path, self.last_model_path, self.kth_best_model_path, *self.best_k_models}
        return [
            path
            for path in self._written
            if path not in kept and Path(path).is_file() and self._should_remove_checkpoint(trainer, path, "")
        ]

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        # Save the weights that validation has measured: the averages, if weights are averaged.
        model = adapted_model(averaged_task(trainer) or trainer.lightning_module)
        fill: Fill | None = None
        state: dict[str, Tensor] = {}
        if model is not None and writes_folders(trainer.lightning_module, model):
            whole = gathered(adapter_state_dict(model))
            check_finite(whole, f"The adapter at step {trainer.global_step}, which was not saved,")
            state = gathered(folded_state_dict(model))  # by all ranks, where one is about to write
            fill = self._filler(trainer, model, state)
        if filepath not in self._written:
            self._written.append(filepath)  # before saving, because it will be part of the state
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, AdapterCheckpointIO):
            super()._save_checkpoint(trainer, filepath)
            self._write_folder(trainer, filepath, model, state)
            return
        with io.saving(fill):
            trainer.save_checkpoint(filepath, self.save_weights_only)
        failure = trainer.strategy.broadcast(io.failure)
        if failure is not None:
            raise CheckpointError(failure)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _filler(self, trainer: L.Trainer, model: nn.Module, state: dict[str, Tensor]) -> Fill:
        """Return a function that writes the adapter folder of the current state."""

        def fill(folder: Path, record: FileRecord) -> None:
            facts, extra = run_facts(trainer), _extra_files(trainer, model)
            base = self._base_fingerprint
            fill_adapter_folder(
                folder, model, facts, checkpoint=record, base_fingerprint=base, state=state, extra=extra
            )

        return fill

    def _write_folder(
        self, trainer: L.Trainer, filepath: str, model: nn.Module | None, state: dict[str, Tensor]
    ) -> None:
        """Write the adapter folder beside a checkpoint that a user's plugin has written."""
        if model is None or not state:
            return
        if trainer.is_global_zero:
            folder = folder_of(filepath)
            if folder.is_symlink():
                folder.unlink()
            facts, extra = run_facts(trainer), _extra_files(trainer, model)
            base = self._base_fingerprint
            write_adapter_folder(folder, model, facts, base_fingerprint=base, state=state, extra=extra)
        trainer.strategy.barrier("AdapterCheckpoint.save")

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if filepath in self._written:
            self._written.remove(filepath)
        link = Path(self.last_model_path)
        if trainer.is_global_zero and link.is_symlink() and link.resolve() == Path(filepath).resolve():
            self._link_checkpoint(trainer, self._last_checkpoint_saved, self.last_model_path)
        super()._remove_checkpoint(trainer, filepath)
        folder = folder_of(filepath)
        if trainer.is_global_zero and (folder.is_symlink() or is_adapter_folder(folder)):
            remove_folder(folder)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        source, link = Path(filepath).absolute(), Path(linkpath).absolute()
        if trainer.is_global_zero and source != link:
            replace_link(source, link)
            if is_adapter_folder(folder_of(source)):
                replace_link(folder_of(source), folder_of(link))
        trainer.strategy.barrier()

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """Return the checkpoint of `ckpt_path="last"`: the newest complete one, whatever its name."""
        # Lightning gives no other name to the folder before `setup`.
        folder = Path(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]  # name-mangled
        newest = newest_complete(folder)
        found: set[str] = super()._find_last_checkpoints(trainer)
        if newest is None:
            return found
        damaged = [path for path in map(Path, found) if _written_at(path) > _written_at(newest)]
        if damaged:
            rank_zero_warn(
                f"{damaged[0]} is damaged, so the run resumes from {newest}, the newest complete checkpoint."
            )
        return {str(newest)}


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns


def run_facts(trainer: L.Trainer) -> RunFacts:
    """Collect the facts about a run for the manifest; facts that module and data module lack stay empty."""
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    names = getattr(module, "label_names", None) or getattr(data, "label_names", None)
    base, data_fingerprint = getattr(module, "backbone", None), getattr(data, "fingerprint", None)
    return RunFacts(
        base=base if isinstance(base, str) else None,
        data_fingerprint=data_fingerprint if isinstance(data_fingerprint, str) else None,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer_of(trainer)),
        tokenizer=SavedTokenizer.of_data(data, base if isinstance(base, str) else None),
        task=f"{type(module).__module__}.{type(module).__qualname__}",
        label_names=[str(name) for name in names] if names else None,
        metrics={name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        epoch=trainer.current_epoch,
        step=trainer.global_step,
    )


def _extra_files(trainer: L.Trainer, model: nn.Module) -> dict[str, bytes]:
    """Return files for other tools (tokenizer, generation settings) and the task's state outside the model."""
    module = trainer.lightning_module
    texts = text_files(model, tokenizer_of(trainer), run_facts(trainer).tokenizer, generation_settings_of(module))
    return {**texts, **own_file(_own_tensors(averaged_task(trainer) or module, model))}


def _own_tensors(module: Any, model: nn.Module) -> dict[str, Tensor]:  # noqa: ANN401 - a LightningModule
    """Return the state of a module outside its adapted model, which would be lost otherwise."""
    if is_finetuned(module):
        return own_state(module, reduced(module, module.state_dict()))
    is_task = getattr(module, "model", None) is not None and model is unwrap(module.model)
    return own_entries(module.state_dict()) if is_task else {}


def writes_folders(module: L.LightningModule, model: nn.Module) -> bool:
    """Return whether adapter folders can be written; the fingerprint of a sharded base must have been taken before.

    A folder holds the adapters of one name of one model, not of several submodules. Parameters that DeepSpeed's third
    stage partitions (it marks each with an id) are never complete.
    """
    parameters = list(model.parameters())
    if not attached_methods(model) or len(adapter_names(model)) > 1:
        return False
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return False
    return not is_sharded(model) or getattr(module, "base_fingerprint", None) is not None
