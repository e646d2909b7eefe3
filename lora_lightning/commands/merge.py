"""The command `lora-lightning merge`."""

from __future__ import annotations

from lora_lightning.checkpoint.merging import LayerMerge, merge_checkpoint

MAX_LAYERS_SHOWN = 5


def merge(ckpt_path: str, output_dir: str, task_class: str | None = None) -> None:
    """Merge a checkpoint's adapter into its base and write a plain Hugging Face folder.

    The folder holds weights, config, tokenizer and label names, and needs nothing of this library. It appears only
    when it is complete.

    Args:
        ckpt_path: The .ckpt file, such as runs/version_0/checkpoints/last.ckpt.
        output_dir: The folder to write; it must not exist, or be empty.
        task_class: Import path of the task, such as my_module.MyTask; needed only where the checkpoint was written by
            a task of your own.
    """
    report = merge_checkpoint(ckpt_path, output_dir, task_class)
    print(f"Merged {len(report.layers)} layers of {ckpt_path} into {report.output_dir} ({report.num_bytes:,} bytes).")
    print(f"Of the update, {report.survived:.2%} of the elements survived the cast to the base's precision.")
    for layer in _worst(report.layers):
        print(f"  {layer.path}: {layer.survived:.2%}")
    if not report.has_tokenizer:
        print("The folder holds no tokenizer.")


def _worst(layers: tuple[LayerMerge, ...]) -> list[LayerMerge]:
    """Return the layers that lost most, a few of them."""
    lossy = [layer for layer in layers if layer.survived < 1]
    return sorted(lossy, key=lambda layer: layer.survived)[:MAX_LAYERS_SHOWN]
