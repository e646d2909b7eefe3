"""A tiny Llama on disk with a tokenizer that knows conversations, and checkpoints of tasks on it."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_lightning.methods import LoRA
from lora_lightning.tasks import CausalLM
from tests import models
from tests.checkpoint.runs import save_checkpoint

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<model>", "<end>"]
WORDS = [f"w{index}" for index in range(models.VOCABULARY - len(SPECIAL))]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }} "
    "{% else %}{{ '<user> ' if message.role == 'user' else '<model> ' }}{{ message.content }} <end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<model> {% endif %}"
)
END_OF_TURN = SPECIAL.index("<end>")


def save_language_model(folder: Path, *, chat_template: str | None = TEMPLATE, name: str = "llama") -> Path:
    """Write a tiny language model and its tokenizer, which knows the words w0, w1, …"""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    models.build(name).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<model>", "<end>"],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def save_lm_checkpoint(folder: Path, path: Path, **settings: object) -> Path:
    """Write the checkpoint of a task with a moved adapter on the model in `folder`."""
    task = CausalLM(backbone=str(folder), method=LoRA(r=4, target_modules="all-linear"), **settings)
    torch.manual_seed(0)
    return save_checkpoint(task, path)
