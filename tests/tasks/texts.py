"""Tiny models with an encoder and a decoder, a tokenizer of letters, and batches for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lora_lightning import LoRA, Optim, Seq2SeqLM
from tests import models

IGNORED = -100
END = 2


def bart() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=models.VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config).eval()


BUILDERS = {"t5": lambda: models.build("t5"), "bart": bart}


class Writer(Seq2SeqLM):
    """Writes through a model of `BUILDERS`, its adapters moved off their start; keeps the gradients of each step."""

    def __init__(self, name: str = "t5", dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        usual = {"method": LoRA(r=3, target_modules="all-linear"), "optim": Optim(lr=0.1, schedule="constant")}
        super().__init__(**{**usual, **settings})
        self.name, self.model_dtype = name, dtype
        self.gradients: list[dict[str, Tensor]] = []

    def configure_backbone(self) -> nn.Module:
        return BUILDERS[self.name]().to(self.model_dtype)

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            models.perturb(self.adapted)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """See the gradients as clipping does."""
        named = self.adapted.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        super().configure_gradient_clipping(*args, **kwargs)


def batches(shapes: tuple[tuple[int, int], ...] = ((5, 3), (9, 8), (4, 12)), rows: int = 3) -> list[dict[str, Tensor]]:
    """Return batches of source and target lengths; the last row of each has a shorter target."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for source, target in shapes:
        ids = torch.randint(3, models.VOCABULARY, (rows, source), generator=generator)
        labels = torch.randint(3, models.VOCABULARY, (rows, target), generator=generator)
        labels[:, -1] = END
        labels[-1, -2], labels[-1, -1] = END, IGNORED
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def padded(batch: dict[str, Tensor], left: int = 0, right: int = 0, target: int = 0) -> dict[str, Tensor]:
    """Return a batch with more padding around the sources and behind the targets."""
    pad = nn.functional.pad
    return {
        "input_ids": pad(batch["input_ids"], (left, right), value=0),
        "attention_mask": pad(batch["attention_mask"], (left, right), value=0),
        "labels": pad(batch["labels"], (0, target), value=IGNORED),
    }


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return all rows of some batches as one batch."""
    source, target = (max(part[name].shape[1] for part in parts) for name in ("input_ids", "labels"))
    wide = [
        padded(part, right=source - part["input_ids"].shape[1], target=target - part["labels"].shape[1])
        for part in parts
    ]
    return {name: torch.cat([part[name] for part in wide]) for name in wide[0]}


def save_t5(folder: Path) -> str:
    """Save a tiny T5 with a tokenizer that knows single letters and ends texts as T5's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    ends = ["<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(BPE({token: index for index, token in enumerate([*ends, *letters])}, []))
    plain.add_special_tokens([AddedToken(end, special=True) for end in ends])
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(plain.get_vocab()),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)
