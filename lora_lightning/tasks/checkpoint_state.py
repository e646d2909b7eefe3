"""State of a task in checkpoints: adapters, trained copies and state of methods, without the frozen base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from lora_lightning.adapters import Method, adapter_state_dict, load_adapter_state_dict
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.backbones.tokenizer_identity import check_tokenizer, tokenizer_of
from lora_lightning.checkpoint.base_sample import BaseSample
from lora_lightning.checkpoint.fingerprint import check_base, check_fingerprint, fingerprint
from lora_lightning.checkpoint.folder import RunFacts, check_finite, is_adapter_folder
from lora_lightning.checkpoint.manifest import read_manifest
from lora_lightning.checkpoint.own_state import MODEL, own_entries
from lora_lightning.checkpoint.saved_run import SavedRun, facts_of_manifest
from lora_lightning.errors import ConfigError
from lora_lightning.optim import Optim
from lora_lightning.paths import resolve
from lora_lightning.resume.precision import double_before_loading
from lora_lightning.tasks.averaging import complete_averages, shrink_averages
from lora_lightning.tasks.loading import (
    CheckedLoading,
    check_optimization,
    entry_of,
    own_entries_for,
    own_entry,
    require_training_state,
)


class CheckpointState(CheckedLoading):
    """The part of `AdapterTask` that writes its checkpoints and reads them."""

    methods: tuple[Method, ...]
    optim: Optim
    adapter: str | None
    base_fingerprint: str | None
    _is_calibrated: bool
    _takes_state_of_checkpoint: bool
    _starting_run: SavedRun | None
    _refuses_untrained = False

    @property
    def adapted(self) -> nn.Module:
        """The adapted model."""
        raise NotImplementedError  # a subclass defines it

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the state in checkpoints: adapters, trained copies, and state of this module outside the model."""
        adapters = {MODEL + name: tensor for name, tensor in adapter_state_dict(self.adapted).items()}
        return {**adapters, **own_entries(self.state_dict())}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the full state dict with the adapter state, and add the state of the methods."""
        shrink_averages(self, checkpoint)
        checkpoint["lora_lightning"] = entry_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the base, and restore the state of the methods.

        Raises:
            CheckpointError: The checkpoint is not one of this library, was trained on another base, or holds too little
                to train on from it.
        """
        own = own_entry(checkpoint, len(self.methods))
        require_training_state(checkpoint, self._trainer)
        self.configure_model()
        check_optimization(checkpoint, self.optim, self._trainer, self.adapted)
        double_before_loading(self)
        self._is_calibrated = True
        self._check_base(own)
        check_tokenizer(tokenizer_of(self._trainer), own.get("tokenizer_fingerprint"), "The checkpoint")
        for method, state in zip(self.methods, own["method_state"], strict=True):
            method.load_extra_state(self.adapted, state)
        complete_averages(self, checkpoint)

    def _check_base(self, own: Mapping[str, Any]) -> None:
        """Refuse another base than the checkpoint's; without a sample of its base, the weights must be identical."""
        source, expected = "The checkpoint", own["base_fingerprint"]
        found = self.base_fingerprint or fingerprint(self.adapted)
        theirs = BaseSample.from_plain(own.get("base_sample"), source)
        if theirs is None:
            check_fingerprint(found, expected, source)
        else:
            check_base(self.adapted, expected, theirs, source, found=found)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401 - torch's own signature
        """Load an adapter state, or a whole one; keys and shapes must be exactly this model's.

        Raises:
            CheckpointError: They are not; nothing is changed.
        """
        del strict  # a partly loaded adapter is never wanted
        self.configure_model()
        if any(RESERVED in name.split(".") for name in state_dict):
            return super().load_state_dict(state_dict, assign=assign)
        own = own_entries_for(self, state_dict)
        adapters = {name.removeprefix(MODEL): t for name, t in state_dict.items() if name.startswith(MODEL)}
        check_finite(adapters, "The checkpoint")
        load_adapter_state_dict(self.adapted, adapters)
        self._takes_state_of_checkpoint = False
        if own:
            super().load_state_dict(own, strict=False, assign=assign)
        return _IncompatibleKeys(missing_keys=[], unexpected_keys=[])

    def start_from(self, run: SavedRun) -> None:
        """Start from an adapter folder that was already read, instead of reading `adapter` again."""
        self._starting_run = run

    def facts_of_adapter(self) -> RunFacts | None:
        """Return what the manifest of the adapter to start from says of its training; None for one of PEFT.

        Raises:
            CheckpointError: The manifest is damaged.
        """
        if self._starting_run is not None:
            return self._starting_run.facts
        folder = None if self.adapter is None else resolve(self.adapter)
        if folder is None or not is_adapter_folder(folder):
            return None
        return facts_of_manifest(read_manifest(folder), str(folder))

    def refuse_untrained(self) -> None:
        """Let `configure_model` refuse modules whose weights are drawn at random, unless an adapter brings them."""
        self._refuses_untrained = self.adapter is None

    def check_trained(self, new_modules: Collection[str]) -> None:
        """Refuse new modules after `refuse_untrained`; a trained classifier or a language model has none.

        Args:
            new_modules: The modules for which the backbone's files hold no weights.

        Raises:
            ConfigError: There are some.
        """
        if self._refuses_untrained and new_modules:
            raise ConfigError(
                f"The model's {' and '.join(new_modules)} was never trained: the files of the backbone hold no weights "
                "for it. Name a run's checkpoint with --ckpt_path or an adapter with --model.adapter, or set "
                "--untrained to use random weights."
            )

    def expect_checkpoint(self) -> None:
        """Do not read `adapter`: a checkpoint's weights will be loaded, and the folder may be gone or changed."""
        self._takes_state_of_checkpoint = self.adapter is not None
