"""Write a folder with a Llama, and a LoRA in PEFT's format, as the GGUF files that llama.cpp reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from safetensors.torch import load_file
from torch import Tensor

ARCH = gguf.MODEL_ARCH.LLAMA
NORMAL, CONTROL = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL


def write_model(folder: Path, path: Path) -> Path:
    """Write a Llama of transformers; its tokens get made-up names, since the tests ask with token ids."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCH])
    head_size = config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokens(writer, config["vocab_size"])
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        writer.add_tensor(_name(name, config), _permuted(name, tensor, config).float().numpy())
    return _finish(writer, path)


def write_lora(folder: Path, config: dict[str, Any], path: Path) -> Path:
    """Write the LoRA of a folder in PEFT's format.

    Args:
        folder: The folder.
        config: The config of its base.
        path: Where to.
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCH])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        letter = part.partition(".")[0]
        weight = f"{module}.weight"
        own = _permuted(weight, tensor, config) if letter == "B" else tensor
        writer.add_tensor(f"{_name(weight, config)}.lora_{letter.lower()}", own.float().contiguous().numpy())
    return _finish(writer, path)


def _name(name: str, config: dict[str, Any]) -> str:
    found = gguf.get_tensor_name_map(ARCH, config["num_hidden_layers"]).get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    return found


def _permuted(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """Return a weight with the rows that llama.cpp turns together beside each other; transformers has halves apart."""
    counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = next((count for part, count in counts.items() if f".{part}." in name), None)
    if key is None:
        return tensor
    halves = tensor.reshape(config[key], 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(count)])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([CONTROL if index < 3 else NORMAL for index in range(count)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
