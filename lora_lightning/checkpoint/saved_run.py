"""A saved run: a `.ckpt` or an adapter folder, read once, with all that its model needs to answer as in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_lightning.checkpoint.base_sample import BASE_SAMPLE_NAME, BaseSample, read_base_sample
from lora_lightning.checkpoint.complete import folder_at, newest_first
from lora_lightning.checkpoint.folder import RunFacts, is_adapter_folder, load_tensors, read_adapter_folder
from lora_lightning.checkpoint.manifest import FileRecord, Manifest, check_files, class_config, read_manifest
from lora_lightning.checkpoint.own_state import OWN_STATE_NAME, own_entries
from lora_lightning.checkpoint.peft_folder import PeftFiles, read_peft_files
from lora_lightning.checkpoint.reading import read_checkpoint
from lora_lightning.checkpoint.task_class import (
    build_task,
    class_path_in,
    class_path_of,
    constructor_arguments,
    find_task_class,
    given_in,
    settings_in,
)
from lora_lightning.errors import BackboneError, CheckpointError
from lora_lightning.texts.saved_tokenizer import TOKENIZER_CONFIG, SavedTokenizer

if TYPE_CHECKING:
    import lightning as L


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """Content of a `.ckpt` file or an adapter folder; after it was built, it reads only the tokenizer from disk.

    Args:
        path: The file or folder.
        facts: Facts about the run: base, tokenizer, task, label names, progress.
        manifest: The manifest, or None without one.
        record: Length and digest of a `.ckpt`.
        base_fingerprint: Digest of the base weights under the adapters, or None in a folder that PEFT wrote.
        base_sample: A few values of these weights, in a `.ckpt` or folder of this library.
        content: The content of a `.ckpt`; None for a folder.
        methods: The methods of a folder of this library, as `{"class_path": ..., "init_args": {...}}`.
        state: The tensors of a folder of this library, by the names of `adapter_state_dict`.
        peft: Content of a folder that PEFT wrote.
        tokenizer_folder: The folder that holds the tokenizer's own files, or None.
        own: State of the task of a folder outside its model.
    """

    path: Path
    facts: RunFacts
    manifest: Manifest | None = None
    record: FileRecord | None = None
    base_fingerprint: str | None = None
    base_sample: BaseSample | None = None
    content: dict[str, Any] | None = None
    methods: Sequence[dict[str, Any]] = ()
    state: Mapping[str, Tensor] | None = None
    peft: PeftFiles | None = None
    tokenizer_folder: Path | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, path: str | Path) -> SavedRun:
        """Read a `.ckpt` file.

        Raises:
            CheckpointError: It is missing, damaged, differs from its manifest, or was not written by a task of this
                library.
        """
        path = Path(path)
        file = read_checkpoint(path)
        entry = file.content.get("lora_lightning")
        entry = entry if isinstance(entry, Mapping) else {}
        folder = None if file.manifest is None else folder_at(path, file.manifest)
        return cls(
            path=path,
            facts=_facts_of_checkpoint(file.content, entry, file.manifest, str(path)),
            manifest=file.manifest,
            record=file.record,
            base_fingerprint=entry.get("base_fingerprint"),
            base_sample=BaseSample.from_plain(entry.get("base_sample"), str(path)),
            content=file.content,
            tokenizer_folder=None if folder is None else _tokenizer_folder(folder, file.manifest),
        )

    @classmethod
    def of_folder(cls, folder: Path) -> SavedRun:
        """Read an adapter folder, of this library or of PEFT.

        Raises:
            CheckpointError: It is missing, damaged, or a merged model.
        """
        if not is_adapter_folder(folder):
            files = read_peft_files(folder)
            has_tokenizer = (folder / TOKENIZER_CONFIG).is_file()
            return cls(
                path=folder,
                facts=RunFacts(base=files.config.base, tokenizer=SavedTokenizer(name=files.config.base)),
                peft=files,
                tokenizer_folder=folder if has_tokenizer else None,
            )
        if read_manifest(folder).adapter_format == "merged":
            raise CheckpointError(f"{folder} is a merged model, not an adapter; name it as the backbone.")
        manifest, state = read_adapter_folder(folder)
        return cls(
            path=folder,
            facts=facts_of_manifest(manifest, str(folder)),
            manifest=manifest,
            base_fingerprint=manifest.base_fingerprint,
            base_sample=read_base_sample(folder),
            methods=manifest.methods,
            state=state,
            tokenizer_folder=_tokenizer_folder(folder, manifest),
            own=load_tensors(folder / OWN_STATE_NAME) if OWN_STATE_NAME in manifest.files else {},
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the task that wrote a checkpoint."""
        return settings_in(self._required_content())

    def arguments_for(self, cls: type[L.LightningModule]) -> dict[str, Any]:
        """Return the settings of a checkpoint that a class takes in its constructor."""
        content = self._required_content()
        return constructor_arguments(cls, settings_in(content), given_in(content))

    @property
    def data_class_path(self) -> str | None:
        """The import path of the data module that trained a checkpoint; None if it does not say."""
        entry = self._required_content().get("lora_lightning")
        found = entry.get("data") if isinstance(entry, Mapping) else None
        return found if isinstance(found, str) else None

    def data_settings(self, cls: type[L.LightningDataModule]) -> dict[str, Any] | None:
        """Return the settings of the data module that trained a checkpoint.

        Args:
            cls: The class that is going to take them.

        Returns:
            The settings; None if there are none, or they are those of another class.
        """
        trained_with = self.data_class_path or class_path_of(cls)
        settings = self._required_content().get("datamodule_hyper_parameters")
        if not isinstance(settings, Mapping) or trained_with != class_path_of(cls):
            return None
        return constructor_arguments(cls, {name: value for name, value in settings.items() if name[:1] != "_"})

    @property
    def own_state(self) -> dict[str, Tensor]:
        """State of the task outside its model, of a checkpoint or of a folder of this library."""
        return dict(self.own) if self.content is None else own_entries(self.content["state_dict"])

    def task_class(self, name: str | None = None) -> type[L.LightningModule]:
        """Return the class of the task that wrote a checkpoint.

        Args:
            name: Its import path, which is trusted; None takes the one that the checkpoint names, which must be part of
                this library or imported already, because importing a module runs its code.

        Raises:
            CheckpointError: There is no such class, or it would have to be imported on the checkpoint's word alone.
        """
        return find_task_class(class_path_in(self._required_content()), name, self.path)

    def build(self, task_class: type[L.LightningModule] | str | None = None, **changes: Any) -> L.LightningModule:  # noqa: ANN401 - settings of any type
        """Build the task of a checkpoint with its trained model, on the CPU.

        Args:
            task_class: The task's class, or its import path; see `task_class`.
            **changes: Settings of the task to take instead of the checkpoint's, such as `quantization=None`.

        Raises:
            CheckpointError: The checkpoint or its class cannot be used, or the base is not the one it was trained on.
            BackboneError: The base cannot be loaded.
        """
        cls = task_class if isinstance(task_class, type) else self.task_class(task_class)
        try:
            return build_task(cls, self._required_content(), self.path, changes)
        except BackboneError as error:
            if "backbone" in changes or self.facts.base is None:
                raise
            raise BackboneError(f"{error} If the base lies elsewhere now, name it: --backbone.") from error

    @property
    def has_tokenizer(self) -> bool:
        """Whether it is known which tokenizer the run was trained with."""
        saved = self.facts.tokenizer
        return self.tokenizer_folder is not None or (saved is not None and saved.name is not None)

    def load_tokenizer(self, backbone: str | None = None) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Load the tokenizer of the training, with its additions and its chat template.

        Args:
            backbone: New location of the base, if it has moved.

        Raises:
            BackboneError: It cannot be loaded.
            CheckpointError: No tokenizer is known, or its vocabulary is not that of the training.
        """
        saved = self.facts.tokenizer or SavedTokenizer(name=self.facts.base)
        if self.tokenizer_folder is not None:
            return saved.load(str(self.path), name=str(self.tokenizer_folder))
        is_of_base = saved.name is None or saved.name == self.facts.base
        return saved.load(str(self.path), name=backbone if backbone is not None and is_of_base else saved.name)

    def answers_with(self, tokenizer: Any) -> bool:  # noqa: ANN401 - tokenizers share no public base class
        """Return whether the model was trained to answer messages."""
        return self.facts.tokenizer is not None and self.facts.tokenizer.answers_with(tokenizer)

    def adapter_for(self, model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return the methods to attach to a bare model, and the tensors to load then, of an adapter folder.

        Raises:
            CheckpointError: The adapter does not fit the model.
        """
        if self.peft is not None:
            fitted = self.peft.fit(model)
            return [class_config(method) for method in fitted.methods], fitted.state
        assert self.state is not None
        return list(self.methods), dict(self.state)

    def facts_with(self, task: L.LightningModule) -> RunFacts:
        """Return the facts, updated from a task that was built from the run."""
        backbone, names = getattr(task, "backbone", None), getattr(task, "label_names", None)
        return replace(
            self.facts,
            base=backbone if isinstance(backbone, str) else None,
            task=class_path_of(type(task)),
            label_names=[str(name) for name in names] if names else None,
        )

    def _required_content(self) -> dict[str, Any]:
        assert self.content is not None, "only a .ckpt holds a task"
        return self.content


def generation_settings_of(task: object) -> dict[str, Any]:
    """Return the generation settings that a task was evaluated with, such as `num_beams`; a task may have none."""
    find = getattr(task, "generation_settings", None)
    return {} if find is None else dict(find())


def newest_run(folders: Iterable[Path]) -> SavedRun | None:
    """Read the newest `.ckpt` of some folders that matches its manifest and has a complete adapter folder.

    Args:
        folders: Folders of checkpoints; they may be missing.

    Returns:
        The run; None where there is no complete one.
    """
    for path in newest_first(folders):
        try:
            run = SavedRun.of_checkpoint(path)
            if run.manifest is None:
                continue
            check_files(folder_at(path, run.manifest), run.manifest)
        except (CheckpointError, OSError):
            continue
        return run
    return None


def facts_of_manifest(manifest: Manifest, source: str) -> RunFacts:
    """Return the facts about the run in a manifest."""
    if manifest.tokenizer is None:
        tokenizer = SavedTokenizer(name=manifest.base, fingerprint=manifest.tokenizer_fingerprint)
    else:
        tokenizer = SavedTokenizer.from_plain(manifest.tokenizer, source)
    return RunFacts(
        base=manifest.base,
        data_fingerprint=manifest.data_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        tokenizer=tokenizer,
        task=manifest.task,
        label_names=manifest.label_names,
        metrics=manifest.metrics,
        epoch=manifest.epoch,
        step=manifest.step,
    )


def _facts_of_checkpoint(
    content: Mapping[str, Any], entry: Mapping[str, Any], manifest: Manifest | None, source: str
) -> RunFacts:
    settings = settings_in(content)
    base, names = settings.get("backbone"), entry.get("label_names") or settings.get("label_names")
    base = base if isinstance(base, str) else None
    fingerprint = entry.get("tokenizer_fingerprint")
    kept = entry.get("tokenizer")
    if kept is None:
        tokenizer = SavedTokenizer.from_settings(content.get("datamodule_hyper_parameters"), base, fingerprint)
    else:
        tokenizer = SavedTokenizer.from_plain(kept, source)
    return RunFacts(
        base=base,
        data_fingerprint=None if manifest is None else manifest.data_fingerprint,
        tokenizer_fingerprint=fingerprint,
        tokenizer=tokenizer,
        task=class_path_in(content),
        label_names=[str(name) for name in names] if isinstance(names, list) else None,
        metrics={} if manifest is None else manifest.metrics,
        epoch=int(content.get("epoch", 0)),
        step=int(content.get("global_step", 0)),
    )


def _tokenizer_folder(folder: Path, manifest: Manifest | None) -> Path | None:
    """Return an adapter folder if it holds a tokenizer; its files are compared with the manifest.

    Raises:
        CheckpointError: They differ.
    """
    if manifest is None or TOKENIZER_CONFIG not in manifest.files:
        return None
    files = {name: record for name, record in manifest.files.items() if not _is_of_adapter(name)}
    check_files(folder, replace(manifest, files=files))
    return folder


def _is_of_adapter(name: str) -> bool:
    return name.startswith("adapter") or name in (OWN_STATE_NAME, BASE_SAMPLE_NAME)
