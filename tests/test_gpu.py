"""What must hold on a CUDA device too: the CPU's numbers, compiled graphs, 4-bit bases, offloading, whole runs."""

import contextlib
import copy

import pytest
import torch

from lora_lightning import DoRA, LoRA, attach, merge
from lora_lightning.adapters import disabled, iter_roles
from lora_lightning.adapters.selection.checkpointing import unfollow_selection
from lora_lightning.tasks.backward import recompute
from lora_lightning.tasks.offload import OffloadActivations
from tests import models
from tests.tasks.test_base import FAST, TARGETS
from tests.tasks.toys import Tagger, loader, trainer

pytestmark = pytest.mark.gpu
METHODS = [LoRA(r=4, target_modules="all-linear"), DoRA(r=4, target_modules="all-linear")]


def adapted(method, architecture="llama"):
    model = models.build(architecture).eval()
    attach(model, method)
    with torch.no_grad():
        for _, parameter, _ in iter_roles(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids).logits.square().mean().backward()
    return {name: parameter.grad.cpu() for name, parameter, _ in iter_roles(model)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_outputs_and_gradients_equal_the_cpus(method):
    model, ids = adapted(method), torch.randint(3, 60, (4, 16))
    on_gpu = copy.deepcopy(model).cuda()
    assert torch.allclose(on_gpu(input_ids=ids.cuda()).logits.cpu(), model(input_ids=ids).logits, atol=1e-4)
    expected, found = gradients(model, ids), gradients(on_gpu, ids.cuda())
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
    with torch.no_grad():
        next(iter_roles(on_gpu))[1].add_(0.5)
    assert not torch.allclose(on_gpu(input_ids=ids.cuda()).logits.cpu(), model(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_it_compiles_into_one_graph(kind, dropout):
    model = adapted(kind(r=4, target_modules="all-linear", dropout=dropout)).cuda().train()
    ids = torch.randint(3, 60, (4, 16), device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    compiled(input_ids=ids).logits.square().mean().backward()
    if dropout == 0:
        assert torch.allclose(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_reduced_precision_trains(method, precision):
    model, ids = adapted(method).cuda(), torch.randint(3, 60, (4, 16), device="cuda")
    reference = model(input_ids=ids).logits
    if precision == "bf16":
        for name, parameter in model.named_parameters():
            if "_lora_lightning" not in name:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
        logits = model(input_ids=ids).logits
    assert torch.allclose(logits.float(), reference, atol=0.2)
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for _, p, _ in iter_roles(model))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_4_bit_host_trains(method):
    from bitsandbytes.nn import Linear4bit

    host = Linear4bit(64, 32, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
    model = torch.nn.Sequential(host)
    attach(model, method)
    model(torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)).float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for _, parameter, _ in iter_roles(model))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_offloaded_activations_leave_the_device_and_come_back(method, checkpointing):
    torch.manual_seed(0)
    model, ids = adapted(method).cuda().train(), torch.randint(3, 60, (256, 32), device="cuda")
    recompute(model, checkpointing)
    found, held = [gradients(model, ids)], []  # a first step, since libraries then take their workspaces
    for offloads in (False, True, True):  # twice, since the second time pinned memory is used again
        model.zero_grad()
        before, offload = torch.cuda.memory_allocated(), OffloadActivations(model, min_bytes=1 << 14)
        with offload if offloads else contextlib.nullcontext():
            loss = model(input_ids=ids).logits.square().mean()
        held.append(torch.cuda.memory_allocated() - before)
        assert bool(offload.num_bytes) == offloads
        loss.backward()
        found.append({name: parameter.grad.cpu() for name, parameter, _ in iter_roles(model)})
    for other in found[1:]:  # not to the bit: attention's backward adds in any order
        assert all(torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-6) for name, gradient in found[0].items())
    assert max(held[1:]) < 0.5 * held[0]


def test_a_run_offloads():
    weights = []
    for offloads in (False, True):
        torch.manual_seed(0)
        task = Tagger(method=TARGETS, optim=FAST, offload_activations=offloads)
        trainer(accelerator="gpu", max_epochs=1).fit(task, loader(num=1 << 15, batch_size=1 << 13), loader())
        weights.append([parameter.detach().cpu() for _, parameter, _ in iter_roles(task.adapted)])
    assert all(torch.allclose(*both, atol=1e-4) for both in zip(*weights, strict=True))


def test_a_run_fits_resumes_and_merges(tmp_path):
    task = Tagger(method=TARGETS, optim=FAST)
    run = trainer(accelerator="gpu", max_epochs=10)
    run.fit(task, loader(), loader())
    assert run.callback_metrics["val/accuracy"] > 0.6
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Tagger.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).cuda().eval()
    x = next(iter(loader()))[0].cuda()
    expected = task.cuda().eval().adapted(x)
    assert torch.allclose(again.adapted(x), expected, atol=1e-5)
    merge(again.adapted)
    assert torch.allclose(again.adapted(x), expected, atol=1e-4)


def test_checkpoints_keep_the_selection_in_autograds_own_thread():
    model, ids = adapted(METHODS[0]).cuda().train(), torch.randint(3, 60, (4, 16), device="cuda")
    expected = gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": True})

    def gradients_of_a_base() -> int:
        model.zero_grad()
        with disabled(model):
            model(input_ids=ids).logits.square().mean().backward()
        return sum(parameter.grad is not None for _, parameter, _ in iter_roles(model))

    found = gradients(model, ids)
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
    assert gradients_of_a_base() == 0
    unfollow_selection(model)
    assert gradients_of_a_base() > 0  # the thread that computes again knows of no block
