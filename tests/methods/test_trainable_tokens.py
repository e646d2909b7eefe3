"""Chosen rows of the embeddings train, in every module that shares them, and nothing else does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_lightning.adapters import adapter_state_dict, detach, disabled, iter_roles, load_adapter_state_dict
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import LoRA, TrainableTokens
from tests import models

IDS = sorted(set(models.inputs(models.build("llama"))["input_ids"][0, :3].tolist()))


def written(architecture: str, rows: torch.Tensor) -> nn.Module:
    """Return a model whose embeddings hold the rows themselves: the reference."""
    model = models.build(architecture)
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS] = rows
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "t5", "bert"])
def test_answers_of_a_model_with_other_rows(architecture: str) -> None:
    """GPT-2, Gemma 3 and T5 share the rows with their output layer; Gemma 3 scales what it looks up."""
    model = models.build(architecture).requires_grad_(False)
    base = models.logits(model)
    report = attach(model, TrainableTokens(token_indices=IDS))
    assert report.num_trainable == 3 * model.get_input_embeddings().embedding_dim
    torch.testing.assert_close(models.logits(model), base, atol=1e-6, rtol=0)
    models.perturb(model, std=0.5)
    rows = next(iter(adapter_state_dict(model).values()))
    torch.testing.assert_close(models.logits(model), models.logits(written(architecture, rows)), atol=1e-5, rtol=0)
    assert (models.logits(model) - base).abs().max() > 1e-2  # negative control
    with disabled(model):
        torch.testing.assert_close(models.logits(model), base, atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_those_of_the_rows(architecture: str) -> None:
    model, reference = models.build(architecture), models.build(architecture)
    attach(model, TrainableTokens(token_indices=IDS))
    models.logits(model).square().mean().backward()
    models.logits(reference).square().mean().backward()
    gradients = [parameter.grad for _, parameter, _ in iter_roles(model)]
    expected = reference.get_input_embeddings().weight.grad
    assert expected is not None
    assert len(gradients) == 1
    torch.testing.assert_close(gradients[0], expected[IDS], atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged(architecture: str) -> None:
    model = models.build(architecture)
    attach(model, [LoRA(r=2), TrainableTokens(token_indices=IDS)])
    models.perturb(model)
    expected = models.logits(model).detach()
    merge(model)
    torch.testing.assert_close(models.logits(model), expected, atol=1e-5, rtol=0)


def test_state_copies_and_detach() -> None:
    model = models.build("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, TrainableTokens(token_indices=IDS[::-1]))
    models.perturb(model)
    expected, state = models.logits(model).detach(), adapter_state_dict(model)
    assert list(state) == ["transformer.wte.tokens"]  # once, though the output layer uses it too
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(models.logits(other), expected, atol=0, rtol=0)
    fresh = models.build("gpt2")
    attach(fresh, TrainableTokens(token_indices=IDS))
    load_adapter_state_dict(fresh, state)
    torch.testing.assert_close(models.logits(fresh), expected, atol=0, rtol=0)
    detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_that_are_replaced_are_no_part_of_the_base() -> None:
    first, second = models.build("llama"), models.build("llama")
    with torch.no_grad():
        second.model.embed_tokens.weight[IDS] += 1
    for model in (first, second):
        attach(model, [LoRA(r=2), TrainableTokens(token_indices=IDS)])
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.model.embed_tokens.weight[0] += 1
    assert fingerprint(first) != fingerprint(second)  # negative control


def test_filled_after_it_was_built_without_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(64, 4))
        attach(model, TrainableTokens(token_indices=IDS, target_modules=["0"]))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    rows = next(parameter for _, parameter, _ in iter_roles(model))
    with torch.no_grad():
        rows.fill_(2)
    assert model(torch.tensor([IDS[0], 0, IDS[-1]])).tolist() == [[2.0] * 4, [0.0] * 4, [2.0] * 4]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"token_indices": []}, ConfigError, "list of token ids"),
        ({"token_indices": [-1]}, ConfigError, "list of token ids"),
        ({"token_indices": [True]}, ConfigError, "list of token ids"),
        ({"token_indices": [3, 3]}, ConfigError, "names a token twice"),
        ({"token_indices": [64]}, ConfigError, r"names token 64, and .* has 64 rows; .*resize_token_embeddings"),
        ({"token_indices": [1], "target_modules": ["layers"]}, TargetError, "ModuleList"),
        ({"token_indices": [1], "target_modules": ["nothing"]}, TargetError, "no module is called 'nothing'"),
    ],
)
def test_refused(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        attach(models.build("llama"), TrainableTokens(**settings))


def test_a_model_that_does_not_say_where_its_embeddings_are() -> None:
    model = nn.Sequential(nn.Embedding(8, 4))
    with pytest.raises(TargetError, match="does not say which module its input embeddings are"):
        attach(model, TrainableTokens(token_indices=[1]))
    attach(model, TrainableTokens(token_indices=[1], target_modules=["0"]))
    assert model(torch.tensor([1])).requires_grad


def test_a_model_that_raises_where_it_is_asked_for_its_embeddings() -> None:
    class Asked(nn.Sequential):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("`get_input_embeddings` not auto-handled for Asked")

    with pytest.raises(TargetError, match="does not say which module its input embeddings are"):
        attach(Asked(nn.Embedding(8, 4)), TrainableTokens(token_indices=[1]))
