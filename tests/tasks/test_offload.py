"""What backward needs goes to host memory and comes back: once, bit for bit, and nothing else."""

from __future__ import annotations

import functools
import gc
import shutil
import weakref

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.functional import Rebuilt, dora_linear, lora_linear, rebuilt_dora_linear
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.methods.recompute import recompute_activations
from lora_lightning.tasks import FSDP2Strategy, backward
from lora_lightning.tasks.offload import MIN_BYTES, NUM_IN_FLIGHT, OffloadActivations
from tests import models
from tests.host_memory import Store, offloading
from tests.tasks.languages import Speaker, batches, joined
from tests.tasks.test_base import FAST, TARGETS
from tests.tasks.toys import Tagger, loader, trainer

SMALL = 2048


def llama(method: LoRA, *, recomputing: bool = False, checkpointing: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    attach(model, method)
    if recomputing:
        recompute_activations(model)
    if checkpointing:
        backward.recompute(model, what=True)
    return models.perturb(model).train()


IDS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, store: Store | None, run: nn.Module | None = None) -> list[Tensor]:
    """Return the gradients of a step; of a store, what it holds goes through it."""
    torch.manual_seed(3)
    run = model if run is None else run
    if store is None:
        loss = run(input_ids=IDS).logits.square().mean()
    else:
        with offloading(model, store):
            loss = run(input_ids=IDS).logits.square().mean()
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*both) for both in zip(some, others, strict=True))


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="the backend needs a C++ compiler")
EVERYWHERE = {"r": 4, "target_modules": "all-linear"}
METHODS = pytest.mark.parametrize(
    "method",
    [LoRA(**EVERYWHERE), LoRA(**EVERYWHERE, dropout=0.2), DoRA(**EVERYWHERE), DoRA(**EVERYWHERE, dropout=0.2)],
    ids=["lora", "lora dropout", "dora", "dora dropout"],
)


@METHODS
@pytest.mark.parametrize("settings", [{}, {"recomputing": True}, {"checkpointing": True}], ids=str)
def test_gradients_are_the_same_to_the_bit(method, settings):
    store = Store()
    expected = gradients(llama(method, **settings), None)
    assert are_equal(gradients(llama(method, **settings), store), expected)
    assert sum(store.sizes) > 100_000
    assert min(store.sizes) >= SMALL
    assert {copy.num_restored for copy in store.copies} <= {0, 1}
    damaged = gradients(llama(method, **settings), Store(damage=1))
    assert not any(torch.equal(*both) for both in zip(damaged[:4], expected[:4], strict=True))


def kept_storages(model: nn.Module) -> dict[int, int]:
    """Return the bytes of each storage that a forward pass keeps and that is no parameter or buffer."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(input_ids=IDS)
    del output
    return {key: storage.nbytes() for key, storage in kept.items() if key not in own}


@METHODS
def test_each_storage_goes_once_and_no_weight_does(method):
    model, store = llama(method), Store()
    sizes = kept_storages(model).values()
    offload = offloading(model, store)
    with offload:
        model(input_ids=IDS)
    assert sorted(store.sizes) == sorted(size for size in sizes if size >= SMALL)
    assert offload.num_bytes == sum(store.sizes)
    weights = {parameter.untyped_storage().nbytes() for parameter in model.parameters()} - set(sizes)
    assert max(weights) >= SMALL
    assert not weights & set(store.sizes)


def test_with_checkpointing_the_inputs_of_layers_go_alone():
    store = Store()
    model = llama(LoRA(**EVERYWHERE), checkpointing=True)
    with offloading(model, store):
        model.model(input_ids=IDS)
    inputs, last = 2 * [4 * 32 * 64 * 4], [4 * 32 * 64 * 4]  # what the last norm keeps beside
    assert store.sizes == inputs + last
    assert len(kept_storages(llama(LoRA(**EVERYWHERE)))) > 20


def test_recomputed_inputs_do_not_go():
    stores = {}
    for recomputing in (False, True):
        store = stores[recomputing] = Store()
        gradients(llama(LoRA(**EVERYWHERE), recomputing=recomputing), store)
    assert sum(stores[False].sizes) - sum(stores[True].sizes) == 2 * 4 * 32 * 128 * 4  # the inputs of two layers' downs


# torch.compile itself makes an instance of each autograd function that has a setup_context.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # its own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_a_compiled_model_is_offloaded_too(backend):
    torch.compiler.reset()
    model, store = llama(LoRA(**EVERYWHERE)), Store()
    expected = gradients(model, None, torch.compile(model, backend=backend))
    model = llama(LoRA(**EVERYWHERE))
    assert are_equal(gradients(model, store, torch.compile(model, backend=backend)), expected)
    assert len(store.sizes) > 20
    model = llama(LoRA(**EVERYWHERE))
    assert not are_equal(gradients(model, Store(damage=1), torch.compile(model, backend=backend)), expected)


BOTH = Rebuilt(in_forward=True, in_backward=True)
LAYERS = {
    "beside": lambda x, weight, a, b, _: lora_linear(x, weight, None, a, b, 0.5),
    "rebuilt": lambda x, weight, a, b, _: lora_linear(x, weight, None, a, b, 0.5, rebuilt=BOTH),
    "read": lambda x, weight, a, b, _: lora_linear(x, lambda: weight, None, a, b, 0.5, rebuilt=BOTH),
    "dora": lambda x, weight, a, b, m: dora_linear(x, weight, None, a, b, m, m.detach(), 0.5),
    "rebuilt dora": lambda x, weight, a, b, m: rebuilt_dora_linear(x, weight, None, a, b, m, 0.5),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_what_the_adapters_functions_save_goes(layer):
    x, weight, m = big(32, 64), nn.Parameter(torch.rand(48, 64), requires_grad=False), torch.ones(48)
    factors = [torch.rand(2, 64), torch.rand(48, 2), m]
    host, store = nn.Module(), Store()
    host.register_parameter("weight", weight)
    for tensor in factors:
        tensor.requires_grad_()
    expected = torch.autograd.grad(LAYERS[layer](x, weight, *factors).sum(), [x, *factors[:2]])
    with offloading(host, store):
        loss = LAYERS[layer](x, weight, *factors).sum()
    assert are_equal(torch.autograd.grad(loss, [x, *factors[:2]]), expected)
    of_x, of_y = 32 * 64 * 4, 32 * 48 * 4
    assert sorted(store.sizes) == ([of_y, of_x] if "dora" in layer else [of_x])


# Single tensors.


def big(*shape: int) -> Tensor:
    return torch.rand(*(shape or (64, 64)), requires_grad=True) * 1


def test_views_of_one_storage_come_back_from_one_copy():
    x, store = big(), Store()
    rows = torch.rand(64, 16)
    (expected,) = torch.autograd.grad((x.t()[:16] @ x).sin().sum() + (x[:, 8:24] * rows).exp().sum(), x)
    with offloading(nn.Identity(), store):
        loss = (x.t()[:16] @ x).sin().sum() + (x[:, 8:24] * rows).exp().sum()
    (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, expected)
    of_x = [copy for copy in store.copies if copy.host.numel() == 64 * 64 * 4]
    assert [copy.num_restored for copy in of_x] == [1]


def test_small_tensors_and_the_model_s_own_stay():
    store, layer = Store(), nn.Linear(64, 64)
    layer.register_buffer("table", torch.rand(64, 64))
    with offloading(layer, store, min_bytes=4097):
        (layer(big(16, 64)) @ layer.table.t()).sum()  # 4,096 bytes, and views of weight and buffer
    assert store.sizes == []
    with offloading(layer, store, min_bytes=4096):
        layer(big(16, 64)).sum()
    assert store.sizes == [4096] * len(store.sizes)
    assert store.sizes


def test_on_the_cpu_nothing_goes():
    offload = OffloadActivations(nn.Identity(), min_bytes=0)
    with offload:
        big(1024, 512).sin().sum().backward()
    assert offload.num_bytes == 0
    assert MIN_BYTES == 2**20


def test_an_overwritten_tensor_is_saved_anew():
    store = Store()
    values = torch.rand(64, 64)
    with offloading(nn.Identity(), store), torch.no_grad():
        x = values.clone()
    weight = torch.ones(64, 64, requires_grad=True)
    with offloading(nn.Identity(), store):
        first = weight * x
        for _ in range(NUM_IN_FLIGHT):
            big().sin()
        with torch.no_grad():
            x.add_(1)
        second = weight * x
    (gradient,) = torch.autograd.grad((first + second).sum(), weight)
    torch.testing.assert_close(gradient, 2 * values + 1)


@pytest.mark.parametrize("is_small", [False, True])
def test_overwriting_is_refused_as_without_hooks(is_small):
    def overwritten() -> Tensor:
        x = big()
        y = x.exp()
        y.add_(1)
        return y.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        overwritten().backward()
    with offloading(nn.Identity(), Store(), min_bytes=1 << 30 if is_small else SMALL):
        loss = overwritten()
    with pytest.raises(RuntimeError, match="overwritten by an in-place operation"):
        loss.backward()


def test_an_address_that_is_used_again_is_another_tensor():
    x, store = torch.ones(1, requires_grad=True), Store()
    total = torch.zeros(())
    with offloading(nn.Identity(), store):
        for step in range(50):
            factor = torch.full((64, 64), float(step))
            total = total + (x * factor).sum()
            del factor
    (gradient,) = torch.autograd.grad(total, x)
    assert gradient.item() == 64 * 64 * sum(range(50))


def test_the_device_holds_no_tensor_after_the_block():
    x, store = big(), Store()
    with offloading(nn.Identity(), store):
        y = x.sin()
        held = weakref.ref(y.untyped_storage())
        loss = y.cos().sum()
        del y
        assert held() is not None
        assert not store.copies[-1].is_complete
    gc.collect()
    assert held() is None
    assert all(copy.is_complete for copy in store.copies)
    loss.backward()


def test_few_tensors_wait_for_their_copies():
    store, x = Store(), big()
    with offloading(nn.Identity(), store):
        for _ in range(10):
            x = x.sin()
        assert sum(not copy.is_complete for copy in store.copies) == NUM_IN_FLIGHT


def test_a_graph_can_be_gone_through_twice():
    x, store = big(), Store()
    with offloading(nn.Identity(), store):
        loss = F.gelu(x.sin()).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


# In a task.


def stand_in(monkeypatch: pytest.MonkeyPatch, damage: int = 0) -> Store:
    """Let tasks offload from the CPU."""
    store = Store(damage)
    replaced = functools.partial(OffloadActivations, store=store, is_movable=lambda _: True, min_bytes=SMALL)
    monkeypatch.setattr(backward, "OffloadActivations", replaced)
    return store


def fitted(**settings) -> list[Tensor]:
    torch.manual_seed(0)
    task = Tagger(method=TARGETS, optim=FAST, **settings)
    trainer(max_epochs=1).fit(task, loader(), loader())
    return [parameter.detach() for parameter in task.adapted.parameters() if parameter.requires_grad]


@pytest.mark.filterwarnings("ignore:offload_activations is set")
def test_a_run_is_the_same(monkeypatch):
    expected = fitted()
    store = stand_in(monkeypatch)
    assert are_equal(fitted(offload_activations=True), expected)
    assert len(store.copies) > 4
    assert sum(copy.num_restored for copy in store.copies) > 4
    num_copies = len(store.copies)
    fitted()
    assert len(store.copies) == num_copies
    stand_in(monkeypatch, damage=1)
    assert not are_equal(fitted(offload_activations=True), expected)


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_a_chunked_loss_whose_backward_works_in_place(kind, monkeypatch):
    method = LoRA(r=4, modules_to_save=["lm_head"]) if kind == "trained" else LoRA(r=4)
    gradients = []
    for offloads in (False, True):
        store = stand_in(monkeypatch)
        task = Speaker(method=method, offload_activations=offloads)
        task.configure_model()
        models.perturb(task.adapted)
        loss = backward.offloaded(task, task.token_sums)(joined(batches(lengths=(24, 20)))).loss
        gradients.append(torch.autograd.grad(loss / 3, [p for p in task.adapted.parameters() if p.requires_grad]))
        assert bool(store.copies) == offloads
    assert are_equal(*gradients)


def test_a_run_on_the_cpu_says_that_nothing_is_offloaded():
    with pytest.warns(UserWarning, match="this run is on cpu, not on a CUDA device: there is nothing to offload"):
        fitted(offload_activations=True)
    task = Tagger(method=TARGETS, offload_activations=True)
    trainer().validate(task, loader(), verbose=False)  # which has no backward, and warnings are errors here


def test_sharded_bases_are_refused():
    task = Tagger(method=TARGETS, offload_activations=True)
    task._trainer = trainer(strategy=FSDP2Strategy(process_group_backend="gloo"))
    with pytest.raises(ConfigError, match="under FSDP2Strategy backward keeps weights"):
        task.configure_model()
    assert task.model is None


def test_what_backward_keeps_is_described():
    assert backward.describe_backward(Tagger(method=TARGETS)) == ""
    task = Tagger(method=TARGETS, gradient_checkpointing=True, offload_activations=True)
    assert (
        backward.describe_backward(task)
        == "backward: every layer computed again, the layers' inputs kept in host memory"
    )
    assert task.hparams["offload_activations"] is True
    task = Tagger(method=TARGETS, offload_activations=True)
    assert backward.describe_backward(task) == "backward: all it needs kept in host memory"
