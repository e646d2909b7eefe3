"""A batch whose rows have prompts and prefixes of different lengths, or none: each row answers as it would alone."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lora_lightning import per_row
from lora_lightning.adapters import adapter_names, adapter_state_dict, iter_roles, load_adapter_state_dict
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import LoRA, PrefixTuning, PromptTuning, PTuning, PTuningV2
from tests.models import VOCABULARY, build

METHODS = {
    "three": PromptTuning(num_virtual_tokens=3),
    "five": PTuning(num_virtual_tokens=5),
    "prefix2": PTuningV2(num_virtual_tokens=2),
    "prefix4": PrefixTuning(num_virtual_tokens=4),
    "lora": LoRA(r=4),
    "other3": PromptTuning(num_virtual_tokens=3),
}
LENGTH = 7


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=100,
            word_embed_proj_dim=32,
        )
    )


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=4))


def bart() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, vocab_size=100))


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {"opt": opt, "mamba": mamba, "bart": bart}


def base(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[architecture]() if architecture in BUILDERS else build(architecture)
    return model.double().eval()


def with_names(architecture: str) -> tuple[nn.Module, dict[str | None, nn.Module]]:
    """Return a model with all methods that it takes, and a model with each of them alone."""
    model, alone = base(architecture), {None: base(architecture)}
    for seed, (name, method) in enumerate(METHODS.items()):
        single = base(architecture)
        try:
            attach(model, method, name=name)
        except TargetError:  # a state-space model has no attention
            continue
        attach(single, method)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter, _ in iter_roles(model, name):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
        load_adapter_state_dict(single, adapter_state_dict(model, name))
        alone[name] = single
    return model, alone


def rows(names: list[str | None], padding: str, *, start: int = 3) -> dict[str, Tensor]:
    """Return a batch in which two of three rows are padded."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCABULARY, (len(names), LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(len(names)):
        num = row % 3
        if num and padding == "left":
            mask[row, :num] = 0
        if num and padding == "right":
            mask[row, -num:] = 0
    ids[mask == 0] = start
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if model.config.is_encoder_decoder:
        batch = {**batch, "decoder_input_ids": batch["input_ids"][:, 2:6]}
    with torch.no_grad():
        return model(**batch).logits


def largest_gap(found: Tensor, alone: dict[str | None, nn.Module], names: list, batch: dict[str, Tensor]) -> float:
    gaps = []
    for row, name in enumerate(names):
        single = answer(alone[name], {key: value[row : row + 1] for key, value in batch.items()})[0]
        by_token = single.shape[0] == LENGTH
        real = batch["attention_mask"][row] != 0 if by_token else slice(None)
        gaps.append(float((found[row][real] - single[real]).abs().max()))
    return max(gaps)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "roberta", "opt", "t5", "mamba"])
@pytest.mark.filterwarnings("ignore:all-linear leaves out")
def test_each_row_has_its_own_prompt(architecture):
    model, alone = with_names(architecture)
    names = [*alone, "three"]
    padding_id = model.config.pad_token_id or 0
    # RoBERTa's classifier reads the first column, which padding on the left takes up.
    for padding in ("none", "right") if architecture == "roberta" else ("none", "right", "left"):
        batch = rows(names, padding, start=padding_id)
        with per_row(model, names):
            found = answer(model, batch)
        assert largest_gap(found, alone, names, batch) <= 1e-10, padding
        assert largest_gap(found, alone, [*names[1:], None], batch) >= 1e-3, padding


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mamba", "t5"])
@pytest.mark.filterwarnings("ignore:all-linear leaves out")
def test_each_row_is_generated_with_its_own_prompt(architecture):
    model, alone = with_names(architecture)
    names = [*alone, "three"]
    batch = rows(names, "none" if architecture == "t5" else "left")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if architecture == "t5":
        settings["decoder_start_token_id"] = 0
    for num_beams in (1, 2):
        with per_row(model, names):
            found = model.generate(**batch, **settings, num_beams=num_beams)
        for row, name in enumerate(names):
            own = {key: value[row : row + 1] for key, value in batch.items()}
            single = alone[name].generate(**own, **settings, num_beams=num_beams)[0]
            assert found[row].tolist() == single.tolist(), (name, num_beams)


def test_positions_that_a_model_counts_by_itself_need_equal_lengths():
    model, alone = with_names("bart")
    batch = rows(["three", "other3"], "none")
    with per_row(model, ["three", "other3"]):
        found = answer(model, batch)
    assert largest_gap(found, alone, ["three", "other3"], batch) <= 1e-10
    for names in (["three", "five"], ["three", None]):
        with pytest.raises(ConfigError, match="counts positions by itself"), per_row(model, names):
            answer(model, batch)


def test_gradients_reach_the_prompt_of_each_row():
    model, alone = with_names("llama")
    names = ["three", "five", "prefix4", None]
    batch = rows(names, "right")
    with per_row(model, names):
        model(**batch).logits[batch["attention_mask"] != 0].square().sum().backward()
    assert set(names) - {None} == {name for name in adapter_names(model) if has_gradient(model, name)}
    for row, name in enumerate(names[:3]):
        own = {key: value[row : row + 1] for key, value in batch.items()}
        alone[name](**own).logits[own["attention_mask"] != 0].square().sum().backward()
        expected = {key: parameter.grad for key, parameter, _ in iter_roles(alone[name])}
        for key, parameter, _ in iter_roles(model, name):
            assert torch.allclose(parameter.grad, expected[key], rtol=1e-9, atol=1e-11), (name, key)


def has_gradient(model: nn.Module, name: str) -> bool:
    return any(parameter.grad is not None and parameter.grad.any() for _, parameter, _ in iter_roles(model, name))
