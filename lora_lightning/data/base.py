"""Base of the data modules: stages, and loaders that batch rows of similar length."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lora_lightning.data.batches.batching import LengthGroupedSampler, WholeBatchSampler, even_batch_size
from lora_lightning.data.batches.loaders import RowLoader, own_generator
from lora_lightning.data.batches.mixing import Mixture
from lora_lightning.data.batches.restored import restore_loader_classes
from lora_lightning.data.model_facts import model_facts
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.keywords import ForwardsSettings
from lora_lightning.strategies.facts import facts_of

Batches = DataLoader[Any]


class TokenizedData(ForwardsSettings, L.LightningDataModule, abc.ABC):
    """Reads rows once, encodes those that a stage needs, and makes the batches of a rank.

    A subclass defines `_read` (fills `counts` and `fingerprint`), `_prepare` (loads the tokenizer), `_encode` (returns
    a data set that has `lengths`, the number of tokens of each row), `_collate` and `_splits_read`.

    Args:
        batch_size: Rows in a training batch, on each device.
        eval_batch_size: Rows in any other batch; None means `batch_size`.
        group_by_length: Batch rows of similar length, which reduces padding.
        seed: Seed of the order of training, at least 0.
        num_workers: Processes that make batches; 0 makes them in the main one.
        tokenizer: Hub name, folder, or `pkg://package/folder` of the tokenizer; None means the backbone's own. After
            `setup`, the attribute of this name is the tokenizer itself.

    Attributes:
        counts: What became of the rows; empty before `setup`.
        fingerprint: SHA-256 of the rows and their splits.

    Raises:
        ConfigError: A setting is out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int | None,
        group_by_length: bool,
        seed: int,
        num_workers: int,
        tokenizer: str | None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.num_workers = num_workers
        self.tokenizer_name = tokenizer
        self.tokenizer: Any = None
        self.counts: dict[str, int] = {}
        self.fingerprint = ""
        self._encoded: dict[str, Any] = {}
        self._require_at_least(batch_size=1, eval_batch_size=1, num_workers=0, seed=0)

    # What a subclass defines.

    @abc.abstractmethod
    def _read(self) -> None:
        """Read and divide the rows."""

    @abc.abstractmethod
    def _prepare(self) -> None:
        """Load the tokenizer and what encoding needs; discard encoded rows that no longer match."""

    @abc.abstractmethod
    def _encode(self, split: str) -> Any:  # noqa: ANN401 - data sets with lengths share no public base class
        """Return the encoded rows of a split."""

    @abc.abstractmethod
    def _collate(self) -> Callable[[Any], dict[str, Tensor]]:
        """Return what makes a batch of encoded rows."""

    @property
    @abc.abstractmethod
    def _splits_read(self) -> Collection[str]:
        """The names of the splits that have rows."""

    def _mixture(self) -> Mixture | None:
        """Return what draws the training rows of each epoch; None takes each row once."""
        return None

    # What Lightning calls.

    def setup(self, stage: str | None = None) -> None:
        """Read and split the rows, and encode those that a stage needs; repeated calls reuse the result.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None means all.

        Raises:
            ConfigError: A row is longer than the backbone takes.
            DataError: The data is missing, malformed, does not hold what is needed, or has fewer rows than ranks.
            BackboneError: The tokenizer cannot be loaded.
        """
        if not self.counts:
            self._read()
        self._prepare()
        for kind in self._kinds_of(stage):
            splits = self._splits_of(kind)
            if not splits and stage in ("validate", "test", "predict"):
                raise self._no_rows(kind)
            for split in splits:
                if split not in self._encoded:
                    self._encoded[split] = self._encode(split)
                    self._check_encoded(split)

    def on_exception(self, exception: BaseException) -> None:
        """Leave torch's loader classes as they were, so that the process can run again."""
        del exception
        restore_loader_classes()

    def require_rows(self, *kinds: str) -> None:
        """Read and split the rows without encoding them, and raise an error if a kind has no rows.

        Args:
            *kinds: `val`, `test`.

        Raises:
            DataError: A kind has no rows, or the data cannot be divided.
        """
        if not self.counts:
            self._read()
        for kind in kinds:
            if not self._splits_of(kind):
                raise self._no_rows(kind)

    def train_dataloader(self) -> Batches:
        """Return the training batches of this rank; each epoch has a different order."""
        rows = self._encoded_rows("train")
        num_replicas, rank = self._ranks()
        sampler = LengthGroupedSampler(
            rows.lengths,
            self.batch_size,
            seed=self.seed,
            group_by_length=self.group_by_length,
            num_replicas=num_replicas,
            rank=rank,
            mixture=self._mixture(),
        )
        # With workers, the first iterator may stand before Lightning sets the epoch.
        sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)
        return self._loader(rows, self.batch_size, sampler)

    def val_dataloader(self) -> Batches | list[Any] | dict[str, Batches]:
        """Return the validation batches of this rank, the longest rows first.

        The list is empty without validation rows. Named sets give a mapping from name to loader.
        """
        return self._evaluation_batches("val")

    def test_dataloader(self) -> Batches | list[Any] | dict[str, Batches]:
        """Return the test batches of this rank, the longest rows first; an empty list without such rows."""
        return self._evaluation_batches("test")

    def predict_dataloader(self) -> Batches | dict[str, Batches]:
        """Return the batches to predict of this rank, in file order; the batches are those of a single process.

        Named sets give a mapping from name to loader.
        """
        splits = self._splits_of("predict") or ["predict"]
        loaders = {split.removeprefix("predict/"): self._loader_to_predict(split) for split in splits}
        return loaders["predict"] if splits == ["predict"] else loaders

    # Helpers.

    def _kinds_of(self, stage: str | None) -> tuple[str, ...]:
        of_stage = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        return of_stage[stage] if stage else ("train", "val", "test", "predict")

    def _splits_of(self, kind: str) -> list[str]:
        """Return the splits of a kind that have rows: several where a kind has more than one."""
        return [split for split in self._splits_read if kind_of(split) == kind]

    def _no_rows(self, kind: str) -> DataError:
        """Return the error for a kind of split that has no rows."""
        stage = "validate" if kind == "val" else kind
        size = "val_size" if kind == "val" else "test_size"
        return DataError(f"There are no rows to {stage}: {size} is 0. Set it, or give a file as {kind}.")

    def _require_at_least(self, **least: int) -> None:
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"{name} is {value}: expected a whole number of at least {bound}.")

    def _require_one_of(self, **known: tuple[str, ...]) -> None:
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(values)}.")

    def _check_encoded(self, split: str) -> None:
        """Refuse rows longer than the backbone's context and splits with fewer rows than ranks."""
        lengths = getattr(self._encoded[split], "lengths", [0])
        backbone = getattr(self._module(), "backbone", None)
        most = model_facts(backbone).context if isinstance(backbone, str) else None
        if most is not None and max(lengths) > most:
            raise ConfigError(
                f"A row of {split} has {max(lengths)} tokens, and {backbone} takes at most {most}; set max_length to "
                f"{most} or less."
            )
        num_ranks, _ = self._ranks()
        if num_ranks > 1 and 0 < len(lengths) < num_ranks and kind_of(split) != "predict":
            raise DataError(
                f"{split} has {len(lengths)} rows for {num_ranks} ranks, so that some would have none of their own; "
                "use as many devices as there are rows at most, or give more rows."
            )

    def _module(self) -> L.LightningModule | None:
        return getattr(self.trainer, "lightning_module", None)

    def _name_of_tokenizer(self) -> str:
        """Return the tokenizer's name, or that of the backbone.

        Raises:
            ConfigError: There is neither.
        """
        name = self.tokenizer_name or getattr(self._module(), "backbone", None)
        if not isinstance(name, str):
            raise ConfigError(
                "No tokenizer is named, and there is no backbone to take it from: set tokenizer to a Hub name, a "
                "folder, or pkg://package/folder."
            )
        return name

    def _encoded_rows(self, split: str) -> Any:  # noqa: ANN401 - as _encode has it
        if split not in self._encoded:
            raise ConfigError(f"The {split} rows are not there: call setup() first (the Trainer does).")
        return self._encoded[split]

    def _evaluation_batches(self, kind: str) -> Batches | list[Any] | dict[str, Batches]:
        splits = self._splits_of(kind) if self.counts else [kind]
        if not splits:
            return []
        loaders = {split.removeprefix(f"{kind}/"): self._evaluation_loader(split) for split in splits}
        return loaders[kind] if splits == [kind] else loaders

    def _evaluation_loader(self, split: str) -> Batches:
        rows, (num_replicas, rank) = self._encoded_rows(split), self._ranks()
        size = even_batch_size(len(rows), num_replicas, self.eval_batch_size or self.batch_size)
        sampler = LengthGroupedSampler(rows.lengths, size, shuffle=False, num_replicas=num_replicas, rank=rank)
        return self._loader(rows, size, sampler)

    def _loader_to_predict(self, split: str) -> Batches:
        rows, (num_replicas, rank) = self._encoded_rows(split), self._ranks()
        size = self.eval_batch_size or self.batch_size
        if num_replicas == 1:
            return self._loader(rows, size, collate=self._collate_to_predict())
        # Ranks that gather a layer's weights together must all have a batch for it.
        is_even = self.trainer is not None and not facts_of(self.trainer).keeps_whole
        sampler = WholeBatchSampler(len(rows), size, num_replicas, rank, is_even=is_even)
        return self._loader(rows, size, sampler, self._collate_to_predict())

    def _collate_to_predict(self) -> Callable[[Any], dict[str, Tensor]]:
        """Return what makes a batch of rows to predict."""
        return self._collate()

    def _ranks(self) -> tuple[int, int]:
        """Return the number of processes that share the rows, and the index of this process."""
        shared = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (shared["num_replicas"], shared["rank"]) if shared else (1, 0)

    def _loader(
        self,
        rows: Any,  # noqa: ANN401 - a torch dataset of any kind
        batch_size: int,
        sampler: LengthGroupedSampler | WholeBatchSampler | None = None,
        collate: Callable[[Any], dict[str, Tensor]] | None = None,
    ) -> Batches:
        loading = self._loading()
        if collate is not None:
            loading["collate_fn"] = collate
        keeps = self.num_workers > 0
        return RowLoader(rows, batch_size=batch_size, sampler=sampler, persistent_workers=keeps, **loading)

    def _loading(self) -> dict[str, Any]:
        pin = torch.cuda.is_available()
        return {
            "collate_fn": self._collate(),
            "num_workers": self.num_workers,
            "pin_memory": pin,
            "generator": own_generator(self.seed),
        }
