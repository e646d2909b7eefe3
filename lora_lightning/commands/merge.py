"""The command `lora-lightning merge`."""

from __future__ import annotations

from lora_lightning.commands._push import Target, push
from lora_lightning.commands.export import write_merged


def merge(
    ckpt_path: str,
    output_dir: str,
    task_class: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "1GB",
    dequantize: bool = False,
    force: bool = False,
    sample: str | None = None,
    backbone: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Merge a checkpoint's adapter into its base and write a plain Hugging Face folder.

    The folder holds weights, config, tokenizer and label names, and does not need this library. It gets its name only
    when it is complete. Same as `export --to merged`.

    Args:
        ckpt_path: The .ckpt file, such as runs/version_0/checkpoints/last.ckpt.
        output_dir: The folder to write; it must not exist, be empty, or come from a merge of the same checkpoint.
        task_class: Import path of the task, such as my_module.MyTask; needed only where the checkpoint was written by
            a task of your own.
        dtype: float32, bfloat16 or float16; by default the base's own.
        max_shard_size: Largest size of one weight file.
        dequantize: Merge a run on a quantized base into the dequantized base, not into the dense one.
        force: Write even if the cast loses most of the update.
        sample: A text on which the outputs before and after are compared; by default random tokens.
        backbone: The base, if it has moved since the training; its weights must be the same.
        push_to_hub: A repository of the Hugging Face Hub to upload the folder to, owner/name; it is created if missing.
        private: Upload only to a private repository.
    """
    target = Target.of(push_to_hub, private)
    write_merged(ckpt_path, output_dir, task_class, dtype, max_shard_size, dequantize, force, sample, backbone)
    push(target, output_dir)
