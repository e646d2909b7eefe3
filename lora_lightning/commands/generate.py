"""The command `lora-lightning generate`."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.adapters import disabled
from lora_lightning.checkpoint.files import write_atomically
from lora_lightning.commands._language.columns import Columns
from lora_lightning.commands._language.model import Device, LanguageModel, load_language_model
from lora_lightning.commands._language.prompts import read_prompts
from lora_lightning.commands._language.sampling import Sampling
from lora_lightning.errors import ConfigError

MIN_WIDTH = 60
STDOUT = "-"


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
    repetition_penalty: float = 1.0,
    stop: list[str] | str | None = None,
    batch_size: int = 1,
    seed: int = 0,
    compare_base: bool = False,
    chat: bool | None = None,
    output_file: str | None = None,
    template: str | None = None,
    device: Device = "auto",
    task_class: str | None = None,
) -> None:
    """Write on from a prompt, or from each prompt of a file, with a fine-tuned language model.

    The answer to one prompt is printed word by word, those of a batch when the batch is done. With --compare-base, the
    answer of the base is shown on the left.

    Args:
        ckpt_path: The .ckpt file, such as runs/version_0/checkpoints/last.ckpt.
        adapter_dir: An adapter folder instead, ours or PEFT's.
        backbone: The base, if it is not the one that the adapter was trained on; without an adapter, the model to use.
        prompt: The prompt.
        prompts_file: A file with a prompt on each line; in a .jsonl file, JSON strings or objects with `prompt`; in
            .csv, .tsv and .parquet files, a column `prompt`.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: 0 decodes greedily; a larger value samples.
        top_p: Sample from the most probable tokens whose probabilities sum to this.
        top_k: Sample from this many of the most probable tokens; 0 means all.
        repetition_penalty: A value above 1 makes tokens less likely that prompt or answer already hold.
        stop: A text, or a list of texts, that ends an answer; the answer does not contain it.
        batch_size: Number of prompts in a batch; each gets the same answer as alone.
        seed: Seed of the sampling; each prompt, also for the base, starts from it.
        compare_base: Show the base's answer beside the adapter's.
        chat: Whether the prompt is a message to answer, formatted with a chat template; by default, if the training
            used one.
        output_file: A .jsonl file to write too, an object for each prompt; it must not exist. `-` writes only these
            lines to standard output.
        template: A chat template to use instead of the training's: its name (chatml, gemma, ...) or a .jinja file.
        device: Where to run: auto, cpu, cuda or mps.
        task_class: Import path of the task, for a checkpoint of a task of your own.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop=[stop] if isinstance(stop, str) else stop or [],
    )
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: expected at least 1.")
    prompts = read_prompts(prompt, prompts_file)
    output = _output(output_file)
    speaker = load_language_model(
        ckpt_path, adapter_dir, backbone, template=template, device=device, task_class=task_class
    )
    if compare_base and not speaker.has_adapter:
        raise ConfigError("compare_base needs an adapter to compare with its base; give --ckpt_path or --adapter_dir.")
    is_chat = speaker.answers if chat is None else chat
    tokens = [_encode(speaker, text, is_chat=is_chat) for text in prompts]  # mistakes show before the first answer
    asked = _Asked(speaker, sampling, seed, is_chat, compare_base)
    rows: list[dict[str, str]] = []
    try:
        _answer_all(asked, prompts, tokens, batch_size, rows, is_quiet=output_file == STDOUT)
    finally:  # what was written so far is kept, also after Ctrl-C
        if output is not None and rows:
            write_atomically(output, "".join(f"{_json(row)}\n" for row in rows).encode())


@dataclass(frozen=True)
class _Asked:
    """The model and the settings of all answers."""

    speaker: LanguageModel
    sampling: Sampling
    seed: int
    is_chat: bool
    compare_base: bool


def _encode(speaker: LanguageModel, text: str, *, is_chat: bool) -> list[int]:
    ids = speaker.encode_chat([{"role": "user", "content": text}]) if is_chat else speaker.encode(text)
    if len(ids) >= speaker.context:
        raise ConfigError(
            f"A prompt has {len(ids)} tokens, and the model takes {speaker.context}, its answer included; shorten it: "
            f"{text[:60]!r}…"
        )
    return ids


def _answer_all(
    asked: _Asked,
    prompts: list[str],
    tokens: list[list[int]],
    batch_size: int,
    rows: list[dict[str, str]],
    *,
    is_quiet: bool,
) -> None:
    """Answer every prompt and print the answers; add a row for each to `rows` as soon as it is there."""
    for start in range(0, len(prompts), batch_size):
        if batch_size == 1 and not is_quiet:
            _show_prompt(prompts, start)
            rows.append({"prompt": prompts[start], **_stream(asked, tokens[start])})
            continue
        for index, answer in enumerate(_answer_batch(asked, tokens[start : start + batch_size]), start):
            rows.append({"prompt": prompts[index], **answer})
            if is_quiet:
                _print(_json(rows[-1]))
            else:
                _show_prompt(prompts, index)
                _show(answer)


def _stream(asked: _Asked, ids: list[int]) -> dict[str, str]:
    """Print the answer to one prompt while it is generated, optionally beside the base's, and return both."""
    speaker = asked.speaker
    settings: dict[str, Any] = {"seed": asked.seed, "is_chat": asked.is_chat}
    if not asked.compare_base:
        text = speaker.go_on(ids, asked.sampling, **settings, write=_write)
        print(flush=True)
        return {"generated": text}
    with disabled(speaker.model):
        base = speaker.go_on(ids, asked.sampling, **settings)
    columns = _columns(base)
    text = speaker.go_on(ids, asked.sampling, **settings, write=columns.write)
    columns.close()
    return {"generated": text, "base": base}


def _answer_batch(asked: _Asked, prompts: list[list[int]]) -> list[dict[str, str]]:
    """Return the answers to several prompts, optionally with the base's."""
    speaker = asked.speaker
    settings: dict[str, Any] = {"seed": asked.seed, "is_chat": asked.is_chat}
    bases: list[str] = []
    if asked.compare_base:
        with disabled(speaker.model):
            bases = speaker.go_on_all(prompts, asked.sampling, **settings)
    texts = speaker.go_on_all(prompts, asked.sampling, **settings)
    if not asked.compare_base:
        return [{"generated": text} for text in texts]
    return [{"generated": text, "base": base} for text, base in zip(texts, bases, strict=True)]


def _show_prompt(prompts: list[str], index: int) -> None:
    """Print a prompt above its answer if there are several."""
    if len(prompts) > 1:
        _print(f"{chr(10) if index else ''}> {prompts[index]}")


def _show(answer: dict[str, str]) -> None:
    """Print a finished answer, beside the base's if there is one."""
    if "base" not in answer:
        _print(answer["generated"])
        return
    columns = _columns(answer["base"])
    columns.write(answer["generated"])
    columns.close()


def _columns(base: str) -> Columns:
    """Return columns with the base's answer on the left, their headings printed."""
    width = max(shutil.get_terminal_size().columns - 1, MIN_WIDTH)
    heading = Columns("base", width, _print)
    heading.write("with the adapter")
    heading.close()
    return Columns(base, width, _print)


def _json(row: dict[str, str]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _output(name: str | None) -> Path | None:
    """Return the output for the answers, and check that it can be written.

    Raises:
        ConfigError: The file exists, or its folder does not.
    """
    if name is None or name == STDOUT:
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
