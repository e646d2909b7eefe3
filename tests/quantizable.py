"""Tiny models whose linear layers take a multiple of 64 inputs, as 4-bit storage wants them on some CPUs."""

import torch
from torch import nn

from tests import models

_SIZES = {
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "distilbert": {"dim": 64, "hidden_dim": 128},
    "roberta": {"hidden_size": 64, "intermediate_size": 128},
    "modernbert": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
}
_DECODER_SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a tiny model like `models.build`, with hidden size 64."""
    narrow = models.build(name)
    for key, value in _SIZES.get(name, _DECODER_SIZES).items():
        setattr(narrow.config, key, value)
    torch.manual_seed(seed)
    model = type(narrow)(narrow.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
