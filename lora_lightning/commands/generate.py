"""The command `lora-lightning generate`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from lora_lightning.adapters import disabled
from lora_lightning.checkpoint.files import write_atomically
from lora_lightning.commands._columns import Columns
from lora_lightning.commands._language_model import Device, LanguageModel, Sampling, load_language_model
from lora_lightning.commands._prompts import read_prompts
from lora_lightning.errors import ConfigError

MIN_WIDTH = 60


def generate(
    ckpt_path: str | None = None,
    adapter_dir: str | None = None,
    backbone: str | None = None,
    prompt: str | None = None,
    prompts_file: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    compare_base: bool = False,
    chat: bool | None = None,
    output_file: str | None = None,
    template: str | None = None,
    device: Device = "auto",
    task_class: str | None = None,
) -> None:
    """Write on from a prompt, or from each prompt of a file, with a fine-tuned language model.

    The words appear as they come. With --compare-base, what the base alone says stands on the left.

    Args:
        ckpt_path: The .ckpt file, such as runs/version_0/checkpoints/last.ckpt.
        adapter_dir: An adapter folder instead, ours or PEFT's.
        backbone: The base, where it is not the one that the adapter was trained on; alone, the model to use.
        prompt: The prompt.
        prompts_file: A file with a prompt on each line; in a .jsonl file, JSON strings or objects with `prompt`.
        max_new_tokens: How many tokens to add at most.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: Draw from the likeliest tokens that make up this share of the probability.
        top_k: Draw from this many of the likeliest tokens; 0 means all.
        seed: Seed of the draws; each prompt, and the base as well, starts from it.
        compare_base: Show the base's answer beside the adapter's.
        chat: Whether the prompt is a message to answer, laid out with a chat template; where it is not given, if
            the training used one.
        output_file: A .jsonl file to write as well, an object for each prompt; it must not exist.
        template: A chat template to use instead of the training's: its name (chatml, gemma, ...) or a .jinja file.
        device: Where to run: auto, cpu, cuda or mps.
        task_class: Import path of the task, for a checkpoint of a task of your own.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    prompts = read_prompts(prompt, prompts_file)
    output = _output(output_file)
    speaker = load_language_model(
        ckpt_path, adapter_dir, backbone, template=template, device=device, task_class=task_class
    )
    if compare_base and not speaker.has_adapter:
        raise ConfigError("compare_base needs an adapter to compare with its base; give --ckpt_path or --adapter_dir.")
    is_chat = speaker.answers if chat is None else chat
    tokens = [_encode(speaker, text, is_chat=is_chat) for text in prompts]  # mistakes show before the first answer
    rows: list[dict[str, str]] = []
    try:
        for text, ids in zip(prompts, tokens, strict=True):
            if len(prompts) > 1:
                print(f"{'' if not rows else chr(10)}> {text}", flush=True)
            rows.append({"prompt": text, **_answers(speaker, ids, sampling, seed, is_chat, compare_base)})
    finally:  # what was written so far is kept, also after Ctrl-C
        if output is not None and rows:
            lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            write_atomically(output, lines.encode())


def _encode(speaker: LanguageModel, text: str, *, is_chat: bool) -> list[int]:
    ids = speaker.encode_chat([{"role": "user", "content": text}]) if is_chat else speaker.encode(text)
    if len(ids) >= speaker.context:
        raise ConfigError(
            f"A prompt has {len(ids)} tokens, and the model takes {speaker.context}, its answer included; shorten it: "
            f"{text[:60]!r}…"
        )
    return ids


def _answers(
    speaker: LanguageModel, ids: list[int], sampling: Sampling, seed: int, is_chat: bool, compare_base: bool
) -> dict[str, str]:
    """Print the answer to one prompt, beside the base's where asked, and return both."""
    if not compare_base:
        text = speaker.go_on(ids, sampling, seed=seed, is_chat=is_chat, write=_write)
        print(flush=True)
        return {"generated": text}
    with disabled(speaker.model):
        base = speaker.go_on(ids, sampling, seed=seed, is_chat=is_chat)
    width = max(shutil.get_terminal_size().columns - 1, MIN_WIDTH)
    heading = Columns("base", width, _print)
    heading.write("with the adapter")
    heading.close()
    columns = Columns(base, width, _print)
    text = speaker.go_on(ids, sampling, seed=seed, is_chat=is_chat, write=columns.write)
    columns.close()
    return {"generated": text, "base": base}


def _output(name: str | None) -> Path | None:
    """Return where the answers go, having made sure that they can.

    Raises:
        ConfigError: The file is there already, or its folder is not.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.exists():
        raise ConfigError(f"{name} exists already; name a file that does not, or remove it.")
    if not path.parent.is_dir():
        raise ConfigError(f"The folder of {name} does not exist; make it first.")
    return path


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print(line: str) -> None:
    print(line, flush=True)
