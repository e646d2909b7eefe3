"""Load a task from a `.ckpt` file that agrees with its manifest, without running code that the file might carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import lightning as L

from lora_lightning.checkpoint.complete import check_checkpoint


class CheckedLoading(L.LightningModule):
    """A LightningModule whose `load_from_checkpoint` compares the file with its manifest first."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,  # noqa: ANN401 - a path, or a file that is open
        map_location: Any = None,  # noqa: ANN401 - as torch.load has it
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,  # noqa: ANN401 - settings of any type
    ) -> Self:
        """Load a task; see Lightning's method of the same name.

        Raises:
            CheckpointError: The file differs from what was written, or the base or the adapter from the checkpoint's.
        """
        if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_file():
            check_checkpoint(Path(checkpoint_path))
        safely = True if weights_only is None else weights_only
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, safely, **kwargs)
