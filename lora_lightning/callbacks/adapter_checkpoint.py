"""Lightning's ModelCheckpoint, with the adapter's own folder beside every checkpoint."""

from __future__ import annotations

import os
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.adapters import adapter_state_dict, folded_state_dict, gathered
from lora_lightning.callbacks.places import adapted_model, is_trial
from lora_lightning.checkpoint import RunFacts, fingerprint, write_adapter_folder
from lora_lightning.checkpoint.files import remove_folder, sync
from lora_lightning.checkpoint.folder import check_finite, is_adapter_folder


class AdapterCheckpoint(ModelCheckpoint):
    """Save checkpoints of the adapter; beside each `<name>.ckpt` stands `<name>/` with the adapter for other tools.

    The `.ckpt` is what training resumes from. The folder is in PEFT's format where PEFT can express the adapter, and
    holds a manifest; it comes and goes with its `.ckpt`. A state with NaN or infinite weights is never saved, so that
    the checkpoint before it stays the last one.

    Args:
        dirpath: Where to save; None means `checkpoints` in the run's folder.
        filename: Name pattern, such as `{epoch}-{step}` (the default).
        monitor: Name of the metric that decides which checkpoints stay; None keeps the newest.
        verbose: Whether each save is announced.
        save_last: Whether `last.ckpt` is written whenever a save is due, also where the metric is not among the best
            (Lightning's own leaves it behind then); `link` makes it a symbolic link to the newest one that stayed.
        save_top_k: How many of the best stay; -1 keeps all, 0 none but `last`.
        save_on_exception: Whether an exception or Ctrl-C saves a checkpoint.
        save_weights_only: Whether optimizer and loops are left out, so that training cannot resume from it.
        mode: Whether a smaller (`min`) or a larger (`max`) value of `monitor` is better.
        auto_insert_metric_name: Whether names of metrics go into the file name.
        every_n_train_steps: Save after so many optimizer steps; excludes the next two.
        train_time_interval: Save after so much time.
        every_n_epochs: Save after so many epochs; 1 where nothing else is given.
        save_on_train_epoch_end: Whether to save before validation instead of after it.
        enable_version_counter: Whether a name that is taken gets a `-v1`; False overwrites.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = True,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=save_top_k,
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
        )
        self._base_fingerprint: str | None = None
        self._step_of_last: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say once when there will be no adapter folders, and measure the base while its weights are in place."""
        self._base_fingerprint = self._step_of_last = None
        model = adapted_model(pl_module)
        if model is None:
            rank_zero_warn("The module has no adapters attached, so AdapterCheckpoint saves plain .ckpt files only.")
        elif not writes_folders(pl_module, model):
            rank_zero_warn(
                "The model is sharded over processes, and nobody took its base's fingerprint before (an AdapterTask "
                "does under FSDP2), so AdapterCheckpoint saves no adapter folders."
            )
        elif trainer.is_global_zero:
            self._base_fingerprint = getattr(pl_module, "base_fingerprint", None) or fingerprint(model)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that there is a last checkpoint, except in a `fast_dev_run`, where Lightning forgets to ask."""
        if not is_trial(trainer):
            super().on_train_end(trainer, pl_module)

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_last is True and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last is True and self._step_of_last == trainer.global_step:
            return
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._step_of_last = trainer.global_step

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        model = adapted_model(trainer.lightning_module)
        if model is None or not writes_folders(trainer.lightning_module, model):
            super()._save_checkpoint(trainer, filepath)
            return
        check_finite(
            gathered(adapter_state_dict(model)), f"The adapter at step {trainer.global_step}, which was not saved,"
        )
        state = gathered(folded_state_dict(model))  # by all ranks, where one is about to write
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            folder = folder_of(filepath)
            if folder.is_symlink():
                folder.unlink()
            facts = run_facts(trainer)
            write_adapter_folder(folder, model, facts, base_fingerprint=self._base_fingerprint, state=state)
        trainer.strategy.barrier("AdapterCheckpoint.save")

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        folder = folder_of(filepath)
        if trainer.is_global_zero and (folder.is_symlink() or is_adapter_folder(folder)):
            remove_folder(folder)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
            source, link = folder_of(filepath), folder_of(linkpath)
            if is_adapter_folder(source):
                link_folder(source, link)
        ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)


def folder_of(filepath: str | Path) -> Path:
    """Return the adapter folder that belongs to a checkpoint file.

    Example:
        >>> folder_of("run/checkpoints/last.ckpt").as_posix()
        'run/checkpoints/last'
    """
    return Path(filepath).with_name(Path(filepath).name.removesuffix(ModelCheckpoint.FILE_EXTENSION))


def link_folder(source: Path, link: Path) -> None:
    """Point a symbolic link at an adapter folder, replacing in one step the link that was there."""
    if not link.is_symlink() and is_adapter_folder(link):
        remove_folder(link)
    new = link.with_name(f".{link.name}.{secrets.token_hex(4)}.tmp")
    new.symlink_to(os.path.relpath(source, link.parent), target_is_directory=True)
    new.replace(link)
    sync(link.parent)


def run_facts(trainer: L.Trainer) -> RunFacts:
    """Gather what the manifest tells about a run; what a module or data module does not have stays empty."""
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    names = getattr(module, "label_names", None) or getattr(data, "label_names", None)
    base, data_fingerprint = getattr(module, "backbone", None), getattr(data, "fingerprint", None)
    return RunFacts(
        base=base if isinstance(base, str) else None,
        data_fingerprint=data_fingerprint if isinstance(data_fingerprint, str) else None,
        task=f"{type(module).__module__}.{type(module).__qualname__}",
        label_names=[str(name) for name in names] if names else None,
        metrics={name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        epoch=trainer.current_epoch,
        step=trainer.global_step,
    )


def writes_folders(module: L.LightningModule, model: nn.Module) -> bool:
    """Tell whether adapter folders can be written: of a sharded base, the fingerprint must have been taken before.

    What DeepSpeed's third stage partitions (it marks each parameter with an id) is never whole.
    """
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return False
    is_sharded = any(hasattr(parameter, "device_mesh") for parameter in parameters)
    return not is_sharded or getattr(module, "base_fingerprint", None) is not None
