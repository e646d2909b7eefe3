"""The checkpoint plugin of `AdapterCheckpoint`: writes `.ckpt` files atomically and checks what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from lora_lightning.checkpoint.complete import newest_complete, vouching_manifest
from lora_lightning.checkpoint.folder import refuse_foreign
from lora_lightning.checkpoint.pair import Fill, folder_of, remove_pair, write_pair
from lora_lightning.checkpoint.reading import read_file
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.errors import CheckpointError, trouble_of_disk


class AdapterCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint and its adapter folder atomically, and refuses to read a changed one.

    `AdapterCheckpoint` replaces Lightning's plugin with it, but keeps a plugin that the user chose. Lightning's plugin
    handles paths that are not local files.

    Args:
        read_already: A run whose `.ckpt` this process has read; the first load returns it instead of reading it again.
    """

    def __init__(self, read_already: SavedRun | None = None) -> None:
        super().__init__()
        self._read_already = read_already
        self._fill: Fill | None = None
        self._is_held = False
        self.failure: str | None = None

    @contextmanager
    def saving(self, fill: Fill | None) -> Iterator[None]:
        """Write an adapter folder with each save in the block, and store an error in `failure` instead of raising it.

        Other processes wait at a barrier after the save; an exception would block them.

        Args:
            fill: Writes the folder; None writes a `.ckpt` alone.
        """
        self._fill, self._is_held, self.failure = fill, True, None
        try:
            yield
        finally:
            self._fill, self._is_held = None, False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:  # noqa: ANN401 - Lightning's own signature
        """Write a checkpoint.

        Raises:
            CheckpointError: The disk cannot be written, or the folder's path is taken; existing files are unchanged.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            self._write(checkpoint, Path(path))
        except CheckpointError as error:
            if not self._is_held:
                raise
            self.failure = str(error)

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Any = None,  # noqa: ANN401 - as torch.load has it
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, without running code in it unless `weights_only=False`.

        Raises:
            CheckpointError: It is missing, damaged, or differs from what was written.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, map_location or _as_stored, weights_only)
        run, self._read_already = self._read_already, None  # Lightning changes what it is given
        if run is not None and run.content is not None and run.path.absolute() == Path(path).absolute():
            return run.content
        content: dict[str, Any] = read_file(
            Path(path), map_location or _as_stored, weights_only=weights_only is not False
        ).content
        return content

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint and its adapter folder."""
        if _is_remote(path):
            super().remove_checkpoint(path)
        else:
            remove_pair(Path(path), lambda: super(AdapterCheckpointIO, self).remove_checkpoint(path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            if self._fill is not None:
                refuse_foreign(folder_of(path))
            write_pair(path, checkpoint, self._fill)
        except OSError as error:
            trouble = trouble_of_disk(error) or error.strerror or str(error)
            step = checkpoint.get("global_step")
            raise CheckpointError(f"Step {step} could not be saved as {path}: {trouble}. {_kept(path)}") from error


def _kept(path: Path) -> str:
    newest = newest_complete(path.parent)
    manifest = None if newest is None else vouching_manifest(newest)
    if manifest is None:
        return "No checkpoint was saved before."
    return f"The newest complete checkpoint is {newest} (step {manifest.step}); free disk space and resume from it."


def _is_remote(path: _PATH) -> bool:
    return "://" in str(path)


def _as_stored(storage: Any, location: str) -> Any:  # noqa: ANN401, ARG001 - torch's own signature
    return storage
