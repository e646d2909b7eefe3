"""Conversations, prompts with completions, and plain texts, for causal language models."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.data.base import Batches, TokenizedData
from lora_lightning.data.chat_templates import chat_template
from lora_lightning.data.conversations import Sample, sample_from
from lora_lightning.data.encoder_setup import build_encoder
from lora_lightning.data.encoding import Encoder
from lora_lightning.data.grouped_splits import fingerprint_of
from lora_lightning.data.model_facts import model_facts
from lora_lightning.data.packing import DocumentBatch, DocumentRows, document_from
from lora_lightning.data.records import files_of, is_hub_source, read_records
from lora_lightning.data.sample_splits import SampleSplits
from lora_lightning.data.streaming import StreamedRows, StreamLoader
from lora_lightning.errors import ConfigError, DataError

_LOOKED_AT_FIRST = 100


class InstructionData(TokenizedData):
    """Reads samples, divides them, encodes them once, and makes batches for `CausalLM`.

    A source is a `.jsonl` (`.ndjson`, `.json`), `.parquet` or `.yml` (chatterbot's dialogues) file, a folder of such
    files, either of them inside an installed package (`pkg://package/folder`), or the name of a Hub data set. Each
    record tells by its fields what it is: `messages` (role and content), `conversations` (from and value), `prompt` and
    `completion`, `instruction` with `input` and `output`, or `text`.

    Conversations are written out by the tokenizer's chat template, or by the one that `template` names. Prompts and
    completions given as texts are too, where there is a template; without one they are plainly joined. Of all this the
    assistant's words are learnt, with the token that ends its turn; plain texts are learnt whole. Each sample ends with
    a token at which the model stops.

    Samples with the same first question stay on one side of a split. Copies of a sample in `train` are dropped. A
    sample that is too long is cut at its end; one that would have no word of an answer left is left out. Both are
    counted, and a warning tells.

    Batches hold `input_ids` and `labels` `[batch, length]`, labels -100 where nothing is learnt and not shifted, and
    `attention_mask`, or with packing `position_ids`; see `DocumentBatch`.

    Args:
        train: Where the training samples are, and those to split off.
        val: Where the validation samples are; None splits them off `train`.
        test: Where the test samples are; None splits them off `train`.
        batch_size: Rows in a training batch, on each device.
        eval_batch_size: Rows in any other batch; None means `batch_size`.
        max_length: Tokens after which a sample is cut, and with packing the length of a row; None means 2,048, or what
            the model takes if that is less.
        template: Name of a chat template (`alpaca`, `chatml`, `dialogue`, `gemma`, `llama3`, `mistral`, `phi3`,
            `plain`, `zephyr`), or a `.jinja` file; None means the tokenizer's own. With `plain`, prompts and
            completions are plainly joined.
        train_on: `assistant` learns the assistant's words only, `all` learns every word.
        packing: Put several samples into a row of `max_length` tokens, in which none sees another.
        padding_side: `right` or `left`, where shorter rows are padded.
        streaming: Read, encode and shuffle `train` while training, for a file larger than memory. Give a file as `val`
            (or `val_size` 0), and the trainer a number of steps. Several files of a folder are read in turn.
        shuffle_buffer: Number of rows among which a streamed row is drawn.
        columns: For our names of fields, the names in the files, such as `{prompt: question, completion: answer}`.
        subset: Configuration of a Hub data set that has several.
        train_size: Number (int) or share (float) of the samples to train on; None means all that the others leave.
        val_size: Number or share of the samples to validate on, where no file is given; None means 0.1, and 0 none.
        test_size: Number or share of the samples to test on, where no file is given; 0 means none.
        group_by_length: Put samples of like length into a batch, so that little is padded; not with packing.
        seed: Seed of the split, of packing and of the order of training, at least 0.
        num_workers: Processes that make batches; 0 makes them in the main one.
        tokenizer: Hub name, folder, or `pkg://package/folder` of the tokenizer; None means the backbone's own.

    Attributes:
        samples: The samples of the splits (`train`, `val`, `test`).
        counts: What became of the rows: `rows_read`, `rows_incomplete` (left out: a blank answer, or none),
            `duplicates_dropped`, `train`, `val`, `test`, `unused`, `leaked` (rows of sources for `val` and `test` whose
            first question is in the training samples); of those encoded, `cut` (at `max_length`), `answers_lost` (left
            out: no answer was left), `tokens` and `tokens_learnt`.
        fingerprint: SHA-256 of the samples and their splits; when streaming, of the files' names, sizes and ends.
        tokenizer: The tokenizer, once `setup` has run; its `chat_template` is the one in use.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.

    Example:
        >>> data = InstructionData("talk.jsonl", template="chatml", max_length=1024, packing=True)
    """

    predicted_split: ClassVar[str] = "test"

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        template: str | None = None,
        train_on: str = "assistant",
        packing: bool = False,
        padding_side: str = "right",
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        columns: dict[str, str] | None = None,
        subset: str | None = None,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float = 0,
        group_by_length: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            group_by_length=group_by_length and not packing,
            seed=seed,
            num_workers=num_workers,
            tokenizer=tokenizer,
        )
        self.save_hyperparameters(logger=False)
        self.max_length = max_length
        self.template = template
        self.train_on = train_on
        self.packing = packing
        self.padding_side = padding_side
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.samples: dict[str, list[Sample]] = {}
        self._check_settings()
        if streaming and (train_size is not None or (val is None and val_size != 0) or test_size):
            raise ConfigError(
                "streaming divides nothing: give files as val and test, or set val_size to 0, and leave train_size out."
            )
        self._splits = SampleSplits(
            sources={"train": train, "val": val, "test": test},
            sizes={
                "train": train_size,
                "val": 0.1 if val_size is None and val is None else val_size or 0,
                "test": test_size,
            },
            columns=columns or {},
            subset=subset,
            seed=seed,
        )
        self._encoder: Encoder | None = None
        self._encoded_by: tuple[str, str | None] | None = None

    # What Lightning calls.

    def prepare_data(self) -> None:
        """Download Hub data sets, in one process."""
        for role, source in self._splits.sources.items():
            if source is not None and is_hub_source(source):
                next(read_records(source, role, self._splits.subset), None)

    def train_dataloader(self) -> Batches:
        """Return the training batches of this rank, in an order of their own for every epoch."""
        if not self.streaming:
            return super().train_dataloader()
        num_replicas, rank = self._ranks()
        epoch = self.trainer.current_epoch if self.trainer else 0
        stream = replace(self._stream(), num_replicas=num_replicas, rank=rank, epoch=epoch)
        return StreamLoader(stream, self.batch_size, **self._loading())

    @property
    def rows(self) -> dict[str, DocumentRows]:
        """The encoded splits, once `setup` has run."""
        return self._encoded

    # Samples.

    def _check_settings(self) -> None:
        self._require_at_least(max_length=2, shuffle_buffer=1)
        for name, known in (("train_on", ("assistant", "all")), ("padding_side", ("right", "left"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}.")
        if self.template is not None:
            chat_template(self.template)

    @property
    def _splits_read(self) -> Collection[str]:
        return self.samples

    def _read(self) -> None:
        """Read what is not streamed, and tell it apart by a fingerprint."""
        if not self.streaming:
            self.samples, self.counts = self._splits.load()
            self.fingerprint = fingerprint_of(self.samples)
            return
        source = str(self._splits.sources["train"])
        if is_hub_source(source):
            raise ConfigError(f"streaming reads files, and train is the Hub data set {source!r}; download it first.")
        given: dict[str, list[Sample]] = {
            split: [] for split in ("val", "test") if self._splits.sources[split] is not None
        }
        counts = Counter(rows_read=0, rows_incomplete=0)
        for split in given:
            given[split] = self._splits.read(split, counts)
        self.samples, self.counts = given, {**counts, **{split: len(those) for split, those in given.items()}}
        digest = hashlib.sha256(fingerprint_of(given).encode())
        for path, _ in files_of(source):
            digest.update(_ends_of(path))
        self.fingerprint = digest.hexdigest()

    def _first_samples(self) -> Iterable[Sample]:
        """Return samples by which a template is chosen."""
        if not self.streaming:
            return self.samples["train"]
        records = itertools.islice(read_records(str(self._splits.sources["train"])), _LOOKED_AT_FIRST)
        found = (sample_from(record, self._splits.columns) for record in records)
        return [sample for sample in found if sample is not None]

    # The tokenizer and what it makes of the samples.

    def _prepare(self) -> None:
        """Load the tokenizer, once for each name, and settle template, length, padding and end."""
        backbone, name = getattr(self._module(), "backbone", None), self._name_of_tokenizer()
        if self._encoded_by == (name, backbone):
            return
        self._encoder = build_encoder(
            name,
            model_facts(backbone if isinstance(backbone, str) else name),
            template=self.template,
            train_on=self.train_on,
            max_length=self.max_length,
            padding_side=self.padding_side,
            first_samples=self._first_samples,
        )
        self.tokenizer = self._encoder.tokenizer
        self._encoded_by = (name, backbone)
        self._encoded.clear()
        if self.streaming:
            self._try_stream()

    def _encode(self, split: str) -> DocumentRows:
        """Encode a split; tell what is lost of it."""
        encoder = self._require_encoder()
        encoded = [encoder.encode(sample) for sample in self.samples[split]]
        kept = [one for one in encoded if one.num_trained]
        cut, lost = sum(one.cut for one in encoded), len(encoded) - len(kept)
        source = self._splits.sources[split] or self._splits.sources["train"]
        if not kept:
            raise DataError(
                f"All labels of the {len(encoded)} {split} rows of {source} are masked, so there is nothing to learn: "
                f"no answer lies within the first {encoder.max_length} tokens ({cut} rows are longer). Set a larger "
                "max_length, or train_on to all."
            )
        if cut or lost:
            rank_zero_warn(
                f"{cut} of {len(encoded)} {split} rows of {source} are longer than {encoder.max_length} tokens and "
                f"were cut; {lost} rows were left out because no answer was left of them. Set a larger max_length "
                "to keep them whole."
            )
        rows = DocumentRows(
            (document_from(one) for one in kept),
            max_length=encoder.max_length if self.packing else None,
            seed=self.seed,
        )
        self.counts[split] = len(kept)
        for key, count in (
            ("cut", cut),
            ("answers_lost", lost),
            ("tokens", rows.num_tokens),
            ("tokens_learnt", rows.num_trained),
        ):
            self.counts[key] = self.counts.get(key, 0) + count
        rank_zero_info(
            f"Data: {len(kept)} {split} samples in {len(rows)} rows, {rows.num_tokens} tokens, {rows.num_trained} of "
            f"them learnt; {self.counts['rows_read']} rows read in all, {self.counts['rows_incomplete']} incomplete, "
            f"{self.counts.get('duplicates_dropped', 0)} duplicates dropped."
        )
        return rows

    # Streaming.

    def _stream(self) -> StreamedRows:
        return StreamedRows(
            str(self._splits.sources["train"]),
            self._require_encoder(),
            columns=self._splits.columns,
            packing=self.packing,
            buffer=self.shuffle_buffer,
            seed=self.seed,
        )

    def _try_stream(self) -> None:
        """Encode the first samples, so that mistakes in them are told before training starts."""
        first = list(itertools.islice(self._stream().documents(warn=False), _LOOKED_AT_FIRST))
        rank_zero_info(
            f"Data: {self._splits.sources['train']} is streamed; its first {len(first)} samples have "
            f"{sum(len(document.ids) for document in first)} tokens."
        )

    # Batches.

    def _require_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ConfigError("The data is not read yet: call setup() first (the Trainer does).")
        return self._encoder

    def _collate(self) -> DocumentBatch:
        return DocumentBatch(
            self.tokenizer.pad_token_id, self.padding_side, self.packing, positions=self._takes_positions()
        )

    def _takes_positions(self) -> bool:
        """Tell whether the model takes `position_ids`; one that is not there yet is taken to.

        Raises:
            ConfigError: It does not, and packing needs them.
        """
        model = getattr(self._module(), "model", None)
        if model is None or "position_ids" in inspect.signature(model.forward).parameters:
            return True
        if self.packing:
            raise ConfigError(
                f"{type(model).__name__} takes no position_ids, so packed samples would see each other; set packing to "
                "false."
            )
        return False


def _ends_of(path: Path, size: int = 1 << 20) -> bytes:
    """Return what tells a large file apart: its name, its size, its first and its last bytes."""
    total = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(size)
        file.seek(max(total - size, 0))
        return f"{path.name} {total}".encode() + first + file.read(size)
