"""Count what merging and exporting an adapter on a model in half precision takes in anonymous memory.

python -m benchmarks.merging [--layers 22]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.memory import peak_anonymous

_WIDTH, _HEADS, _VOCABULARY = 1024, 16, 32_000


def main() -> None:
    """Build a base in one file and in four, merge and export the same adapter on both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22, help="22 make 350M parameters")
    parser.add_argument("--run", nargs=3, metavar=("COMMAND", "CKPT", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps({"peak": _run(*arguments.run)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        _compare(Path(folder), arguments.layers)


def _compare(folder: Path, num_layers: int) -> None:
    digests = []
    for name, shard_size in (("one file", "5GB"), ("four shards", "180MB")):
        base = folder / name.replace(" ", "-")
        num_bytes = _build_base(base, num_layers, shard_size)
        ckpt = _train(base)
        for command in ("merge", "export"):
            out = folder / f"{base.name}-{command}"
            peak = _in_a_process(command, ckpt, out)
            print(f"{name}, {command}: {peak / 1e6:.0f} MB, {peak / num_bytes:.2f}x of {num_bytes / 1e6:.0f} MB")
            if command == "merge":
                digests.append(_digest(out))
    print(f"the same result: {digests[0] == digests[1]}")


def _build_base(folder: Path, num_layers: int, shard_size: str) -> int:
    """Write a model with random weights in bfloat16, the same each time; return the bytes of its weights."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _train(base: Path) -> Path:
    """Save a checkpoint of an adapter on all linear layers, with weights as after some training."""
    import lightning as L
    import torch

    from lora_lightning import CausalLM, LoRA
    from lora_lightning.adapters import iter_roles

    task = CausalLM(str(base), method=LoRA(r=8, target_modules="all-linear"))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=0)
    trainer.fit(task, torch.utils.data.DataLoader([{"input_ids": torch.arange(4), "labels": torch.arange(4)}]))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter, _ in iter_roles(task.adapted):
            parameter.normal_(std=0.02)
    path = base.with_suffix(".ckpt")
    trainer.save_checkpoint(path)
    return path


def _in_a_process(command: str, ckpt: Path, out: Path) -> int:
    words = [sys.executable, "-m", "benchmarks.merging", "--run", command, str(ckpt), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def _run(command: str, ckpt: str, out: str) -> int:
    """Return the peak of anonymous memory above that of the imports, in bytes."""
    import transformers

    from lora_lightning import CausalLM
    from lora_lightning.commands.export import export
    from lora_lightning.commands.merge import merge

    # What any run imports is no part of what these cost.
    assert transformers.LlamaForCausalLM
    assert CausalLM
    commands: dict[str, Callable[[], None]] = {"merge": lambda: merge(ckpt, out), "export": lambda: export(ckpt, out)}
    return peak_anonymous(commands[command])


def _digest(folder: Path) -> str:
    """Return a digest of all weights by name, in however many files they lie."""
    import torch
    from safetensors.torch import load_file

    weights = {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}
    digest = hashlib.sha256()
    for name, one in sorted(weights.items()):
        digest.update(name.encode() + one.view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
