"""Faults that show once the model is built or trains."""

from tests.faults.bench import CKPT, FIT, Fault, method

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
        "resumed with another rate",
        r"`model\.init_args\.optim\.lr` is 1\.0 here",
        [*FIT, "--ckpt_path", CKPT, "--model.optim.lr", "1"],
    ),
    Fault(
        "bottleneck wider than the model",
        r"^BottleneckAdapter: reduction_factor=4096 is larger than the hidden size 32 at",
        method("BottleneckAdapter", "--model.method.reduction_factor", "4096"),
    ),
]
