"""The command `lora-lightning shrink`."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.arithmetic.shrink import shrink as shrink_adapter
from lora_lightning.checkpoint.folder import refuse_taken
from lora_lightning.commands._arithmetic import measurement_on, tell
from lora_lightning.errors import ConfigError


def shrink(
    adapter_dir: str,
    output_dir: str,
    parameters: int | None = None,
    max_error: float | None = None,
    rank: int | None = None,
    nested: list[int] | str | None = None,
    ckpt_path: str | None = None,
    weigh_inputs: bool = False,
) -> None:
    """Cut an adapter to a budget of parameters, an error or a rank, and tell the error.

    With --parameters and --max_error the ranks are divided over all layers at once, by their singular values.

    Args:
        adapter_dir: An adapter folder, ours or PEFT's, or a .ckpt file.
        output_dir: The folder to write; it must not exist, or be empty.
        parameters: Largest number of parameters of all layers; heads do not count.
        max_error: Largest relative error of all layers together, in the Frobenius norm.
        rank: Rank of every layer.
        nested: Ranks to serve at, such as 4,8,16,32; the largest is written, the first k components being the best
            adapter of rank k.
        ckpt_path: A checkpoint whose task and validation data measure what the cut costs, usually the one that the
            adapter comes from.
        weigh_inputs: Weigh each layer by what it is fed on the first training batches of --ckpt_path, so that errors
            are those of the layers' outputs.
    """
    if weigh_inputs and ckpt_path is None:
        raise ConfigError("--weigh_inputs needs data: name the checkpoint whose training data weigh (--ckpt_path).")
    refuse_taken(Path(output_dir))
    measurement = measurement_on(ckpt_path)
    report = shrink_adapter(
        adapter_dir,
        output_dir=output_dir,
        num_parameters=parameters,
        max_error=max_error,
        rank=rank,
        nested=_parse_ranks(nested) if isinstance(nested, str) else nested,
        moments=measurement.moments(adapter_dir) if measurement is not None and weigh_inputs else None,
    )
    tell(f"Cut {adapter_dir} into {report.output_dir}.", report, measurement)


def _parse_ranks(text: str) -> list[int]:
    """Return the ranks of a text such as `4,8,16`.

    Raises:
        ConfigError: A part is not a whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"--nested is {text!r}; it must be whole numbers with commas, such as 4,8,16,32.")
    return [int(part) for part in parts]
