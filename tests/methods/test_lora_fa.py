"""LoRA-FA: equal to PEFT's LoRA with A frozen, and what it keeps for backward."""

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import attach, detach, iter_adapters, iter_roles
from lora_lightning.backbones.attach import attach as attach_to_backbone
from lora_lightning.errors import TargetError
from lora_lightning.methods import LoRA, LoRAFA
from tests import models

pytestmark = [
    # PEFT's own use of transformers, and its advice about tied embeddings.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_equals_peft_with_a_frozen(architecture):
    ours, theirs = models.build(architecture), models.build(architecture)
    batch, base = models.inputs(ours), models.logits(ours)
    hosts = attach_to_backbone(ours, LoRAFA(r=4, alpha=8, target_modules="all-linear")).hosts
    models.perturb(ours)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(hosts), "fan_in_fan_out": architecture == "gpt2"}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    layers = {path: theirs.base_model.model.get_submodule(path) for path in hosts}
    with torch.no_grad():
        for path, _, adapter in iter_adapters(ours):
            layers[path].lora_A["default"].weight.copy_(adapter.lora_A)
            layers[path].lora_B["default"].weight.copy_(adapter.lora_B)
            layers[path].lora_A["default"].weight.requires_grad_(False)

    outputs = [models.logits(model, batch) for model in (ours, theirs)]
    for output in outputs:
        output.square().mean().backward()
    assert models.gap(outputs[0], base) > 1e-2
    assert models.gap(*outputs) <= 1e-5
    adapters = {path: adapter for path, _, adapter in iter_adapters(ours)}
    for path, adapter in adapters.items():
        assert models.gap(adapter.lora_B.grad, layers[path].lora_B["default"].weight.grad) <= 1e-5, path
        assert not adapter.lora_A.requires_grad
    with torch.no_grad():  # the negative control: another A
        next(iter(adapters.values())).lora_A[0] += 1
        assert models.gap(models.logits(ours, batch), outputs[1]) > 1e-3


def test_only_b_trains_and_both_are_kept():
    model = nn.Sequential(nn.Linear(8, 6))
    report = attach(model, LoRAFA(r=2))
    assert report.num_trainable == 12
    assert [name for name, _, _ in iter_roles(model)] == ["0.lora_B"]
    ((_, _, adapter),) = iter_adapters(model)
    assert set(adapter.state_dict()) == {"lora_A", "lora_B"}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    before = adapter.lora_A.clone()
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(adapter.lora_A, before)
    assert adapter.lora_B.any()


TOKENS, WIDTH, DEPTH, RANK = 256, 64, 4, 4


class Stack(nn.Module):
    """Linear layers alone: nothing but the adapters has a reason to keep the layers' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def saved_bytes(method: LoRA) -> int:
    """Return the bytes of all storages that autograd keeps, without those of parameters and buffers."""
    model = Stack().train()
    attach(model, method)
    models.perturb(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(TOKENS, WIDTH))
    output.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_input_is_not_kept(dropout):
    inputs, projections, seeds = DEPTH * TOKENS * WIDTH * 4, DEPTH * TOKENS * RANK * 4, DEPTH * 8
    frozen, trained = (saved_bytes(kind(r=RANK, dropout=dropout)) for kind in (LoRAFA, LoRA))
    assert projections <= frozen <= projections + seeds
    # Without dropout LoRA rebuilds the weight here, and makes its projections again in backward.
    assert trained >= inputs + (projections if dropout else 0)


@pytest.mark.parametrize(("host", "shape"), [(nn.Conv1d(4, 8, 3), (2, 4, 9)), (nn.Conv2d(4, 8, 3), (2, 4, 9, 9))])
def test_convolutions(host, shape):
    x = torch.randn(shape)
    results = []
    for kind in (LoRA, LoRAFA):
        model = nn.Sequential(host)
        torch.manual_seed(3)
        attach(model, kind(r=2, target_modules=["0"]))
        ((_, _, adapter),) = iter_adapters(model)
        with torch.no_grad():
            adapter.lora_B.fill_(0.1)
        model.zero_grad()
        output = model(x)
        output.square().mean().backward()
        results.append((output, adapter.lora_B.grad))
        detach(model)
    assert all(models.gap(*both) <= 1e-6 for both in zip(*results, strict=True))
    assert models.gap(results[0][0], host(x)) > 1e-3


def test_an_embedding_is_refused_by_name():
    with pytest.raises(TargetError, match="'0' is an embedding"):
        attach(nn.Sequential(nn.Embedding(9, 4)), LoRAFA(r=2, target_modules=["0"]))
