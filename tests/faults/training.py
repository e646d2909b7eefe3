"""Faults that show once the model is built or trains."""

import errno
import os
from pathlib import Path

import torch
from transformers import BertModel

from lora_lightning.checkpoint.pair import _Sink
from tests.faults.bench import CKPT, FIT, Fault, method, replaced

BERT_FORWARD, MKDIR = BertModel.forward, Path.mkdir


def hungry(model, *arguments, **settings):
    """Stand in for a forward that asks CUDA for more than there is, once it trains."""
    if model.training:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of")
    return BERT_FORWARD(model, *arguments, **settings)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(path, *arguments, **settings):
    """Stand in for a file system that refuses the folder of the checkpoints."""
    if path.name == "checkpoints":
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    MKDIR(path, *arguments, **settings)


FAULTS = [
    Fault(
        "float16 under float16 trainables",
        r"^The trainable parameter '.*' is float16, which loses small updates",
        [*FIT, "--trainer.precision", "16-true"],
    ),
    Fault("unknown precision of the run", r"^trainer\.precision: expected", [*FIT, "--trainer.precision", "fp4"]),
    Fault(
        "negative epochs",
        r"^`max_epochs` must be a non-negative integer or -1\. You passed in -7",
        [*FIT, "--trainer.max_epochs", "-7"],
    ),
    Fault(
        "rate that diverges",
        r"^Training stopped before optimizer step \d+: the loss is nan .*; learning rate .*e\+29\. .* Lower model",
        [*FIT, "--model.optim.lr", "1e30", "--model.optim.head_lr", "1e30", "--trainer.max_epochs", "5"],
        leaves_run=True,
    ),
    Fault(
        "out of memory",
        r"^Out of memory on cpu \(tried to allocate 20\.00 GiB\) in a train step of a batch of 8 x \d+ tokens, at step "
        r"0\. Change .*\(1\) data\.init_args\.batch_size 4 .*\(2\) .*gradient_checkpointing true.*\(3\) .*max_length",
        replaced(BertModel, "forward", hungry),
        leaves_run=True,
    ),
    # With a real disk that is full, read-only or out of quota: tests/callbacks/test_disk.py.
    Fault(
        "disk full",
        r"^Step 4 could not be saved as \S+\.ckpt: the disk is full\. No checkpoint was saved before",
        replaced(_Sink, "write", no_space),
        leaves_run=True,
    ),
    Fault(
        "folder of checkpoints that is read-only",
        r"^Step 4 could not be saved as \S+\.ckpt: the disk is read-only\. No checkpoint was saved before",
        replaced(Path, "mkdir", read_only),
        leaves_run=True,
    ),
    Fault(
        "LoRA+ without a B",
        r"lora_plus_ratio raises the rate of the B factors, and no adapter of this model has one",
        method("BitFit", "--model.optim.lora_plus_ratio", "16"),
    ),
    Fault(
        "quantized base cast",
        r"^precision='bf16-true' casts the whole model, and a quantized base must not be cast",
        [*FIT, "--model.quantization", "{quant_type: nf4}", "--trainer.precision", "bf16-true"],
    ),
    Fault(
        "resumed with another rank",
        r"`model\.init_args\.method\.init_args\.r` is 3 here.*`adapter: ",
        [*FIT, "--ckpt_path", CKPT, "--model.method.r", "3"],
    ),
    Fault(
        "bottleneck wider than the model",
        r"^BottleneckAdapter: reduction_factor=4096 is larger than the hidden size 32 at",
        method("BottleneckAdapter", "--model.method.reduction_factor", "4096"),
    ),
]
