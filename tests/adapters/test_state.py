import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_lightning.adapters import (
    adapter_state_dict,
    attach,
    folded_state_dict,
    gathered,
    iter_adapters,
    load_adapter_state_dict,
)
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import DoRA, LoRA
from tests.adapters.toys import Bias, Model, ids
from tests.models import gap, perturb


def adapted(**settings) -> Model:
    model = Model()
    attach(model, DoRA(r=2, target_modules=["query"], modules_to_save=["head"], **settings))
    return perturb(model)


def test_keys_are_those_of_the_base_model():
    base = set(Model().state_dict())
    state = adapter_state_dict(adapted())
    assert list(state) == [
        *(f"layer.{index}.query.{name}" for index in (0, 1) for name in ("lora_A", "lora_B", "magnitude")),
        "head.dense.weight",
        "head.dense.bias",
        "head.out.weight",
        "head.out.bias",
    ]
    assert {name for name in state if name.startswith("head")} <= base
    assert not any(tensor.requires_grad for tensor in state.values())


def test_an_embedding_has_the_same_names():
    model = Model()
    attach(model, LoRA(r=2, target_modules=["embed"]))
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
    assert shapes == {"embed.lora_A": (2, 10), "embed.lora_B": (8, 2)}


def test_buffers_of_a_copy_travel_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    attach(model, LoRA(r=2, target_modules=["0"], modules_to_save=["1"]))
    model(torch.randn(5, 4))
    state = adapter_state_dict(model)
    assert {"1.running_mean", "1.num_batches_tracked"} <= state.keys()
    assert state["1.num_batches_tracked"] == 1
    assert model[1].num_batches_tracked == 0


def test_nothing_attached_is_an_empty_state():
    assert adapter_state_dict(Model()) == {}
    load_adapter_state_dict(Model(), {})


def test_round_trip():
    first, second = adapted(), adapted()
    second.load_state_dict({**second.state_dict(), **Model().state_dict()}, strict=False)
    base = {name: tensor for name, tensor in first.state_dict().items() if "_lora_lightning" not in name}
    second.load_state_dict(base, strict=False)
    perturb(second, seed=9)
    assert gap(second(ids()), first(ids())) > 1e-2
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(first).items()}
    load_adapter_state_dict(second, state)
    assert torch.equal(second(ids()), first(ids()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state_dict(second).items())


def test_loading_casts_to_the_models_dtype():
    model = adapted()
    state = {name: tensor.bfloat16() for name, tensor in adapter_state_dict(model).items()}
    load_adapter_state_dict(model, state)
    assert all(tensor.dtype is torch.float32 for tensor in adapter_state_dict(model).values())


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "layer.0.query.lora_A"),
            r"of 10 expected, 1 are missing \(layer.0.query.lora_A\) and 0 are unknown\. Attach the method",
        ),
        (lambda s: {**s, "x.lora_A": torch.ones(1)}, r"0 are missing and 1 are unknown \(x.lora_A\)"),
        (
            lambda s: {f"model.{name}": tensor for name, tensor in s.items()},
            r"10 are missing \(.*, …\) and 10 are unknown \(model\..*, …\)",
        ),
        (lambda s: without(s, *s), r"10 are missing"),
        (
            lambda s: {**s, "layer.0.query.lora_A": torch.ones(3, 8)},
            r"1 of 10 adapter tensors have another shape \(layer.0.query.lora_A \[3, 8\] instead of \[2, 8\]\)",
        ),
        (lambda s: {**s, "layer.1.query.magnitude": torch.ones(8, 1)}, r"\[8, 1\] instead of \[8\]"),
    ],
)  # fmt: skip
def test_errors_leave_the_model_alone(change, message):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    state = change({name: tensor + 1 for name, tensor in before.items()})
    with pytest.raises(CheckpointError, match=message):
        load_adapter_state_dict(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(model).items())


def test_two_methods_share_a_host():
    model = Model()
    attach(model, [LoRA(r=2, target_modules=["query"]), Bias(target_modules=["query"])])
    assert [name for name in adapter_state_dict(model) if name.startswith("layer.0")] == [
        "layer.0.query.lora_A",
        "layer.0.query.lora_B",
        "layer.0.query.delta",
    ]


def test_tensors_made_for_the_folded_state_are_all_there(monkeypatch):
    """One that is gone must not be taken for the next, to which Python may give the same identity."""
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(50))
    attach(model, LoRA(r=1, target_modules="all-linear"))

    def fresh(adapter):
        return {name: tensor.detach() + 0 for name, tensor in adapter.state_dict().items()}

    monkeypatch.setattr("lora_lightning.methods.low_rank.LowRankAdapter.folded_state", fresh)
    for _ in range(20):
        assert folded_state_dict(model).keys() == adapter_state_dict(model).keys()


def test_what_adapters_share_is_there_once():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    attach(model, LoRA(r=1, target_modules="all-linear"))
    first, second, _ = (adapter for _, _, adapter in iter_adapters(model))
    second.lora_A = first.lora_A
    assert list(folded_state_dict(model)) == ["0.lora_A", "0.lora_B", "1.lora_B", "2.lora_A", "2.lora_B"]


def test_a_sharded_adapter_takes_and_gives_whole_tensors(tmp_path):
    """As a user's own `fully_shard` leaves them; one process is enough for the type of the tensors."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(8, 4))
        attach(model, LoRA(r=2))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(hasattr(tensor, "device_mesh") for tensor in adapter_state_dict(model).values())
        whole = {"0.lora_A": torch.randn(2, 8), "0.lora_B": torch.randn(4, 2)}
        load_adapter_state_dict(model, whole)
        found = gathered(adapter_state_dict(model))
        assert not any(hasattr(tensor, "device_mesh") for tensor in found.values())
        for name, tensor in whole.items():
            assert torch.equal(found[name], tensor), name
        with pytest.raises(CheckpointError, match="another shape"):
            load_adapter_state_dict(model, {**whole, "0.lora_A": torch.zeros(2, 7)})
    finally:
        dist.destroy_process_group()
