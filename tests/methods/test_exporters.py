"""Attached adapters in graphs of `torch.export`, `torch.jit.trace` and `torch.onnx.export`, at any size of input."""

import io

import pytest
import torch
from torch import nn

from lora_lightning import attach
from lora_lightning.methods import IA3, AdaLoRA, BitFit, DeltaLoRA, DoRA, LoRA, LoRAFA, VeRA
from tests.models import gap, perturb

HOSTS = ["embedding", "convolution", "up", "down"]
METHODS = {
    "lora": LoRA(r=2, target_modules=HOSTS),
    "pissa": LoRA(r=2, target_modules=HOSTS[1:], init="pissa"),
    "dora": DoRA(r=2, target_modules=HOSTS),
    "dora by inputs": DoRA(r=2, target_modules=HOSTS[2:], magnitude_axis="input"),
    "lora_fa": LoRAFA(r=2, target_modules=HOSTS[1:]),
    "delta_lora": DeltaLoRA(r=2, target_modules=HOSTS, start_step=0),
    "adalora": AdaLoRA(target_r=2, target_modules=HOSTS),
    "vera": VeRA(r=4, target_modules=HOSTS[2:]),
    "ia3": IA3(target_modules=["up"], feedforward_modules=["down"]),
    "bitfit": BitFit(bias=["up", "down"]),
}
IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(0, 20, (4, 90), generator=torch.Generator().manual_seed(1))  # so long that eager rebuilds


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids):
        x = self.norm(self.convolution(self.embedding(ids).transpose(1, 2))).transpose(1, 2)
        return self.down(torch.tanh(self.up(x)))


def adapted(method, **settings):
    torch.manual_seed(0)
    model = Net().eval()
    base = model(OTHERS).detach()
    attach(model, METHODS[method], **settings)
    model = perturb(model, std=0.3)
    assert gap(base, model(OTHERS)) > 1e-3
    return model


def exported(model):
    length = {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("length", min=1, max=512)}
    return torch.export.export(model, (IDS,), dynamic_shapes=(length,), strict=False)


@pytest.mark.parametrize("method", METHODS)
def test_exported_programs_hold_operators_of_torch_alone(method):
    model = adapted(method)
    program = exported(model)
    assert gap(program.module()(OTHERS), model(OTHERS)) < 1e-5
    foreign = [
        node for node in program.graph.nodes if "lora_lightning" in str(node.target) and node.op != "placeholder"
    ]
    assert foreign == []


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_traces_load_without_this_library(method):
    model = adapted(method)
    traced = torch.jit.trace(model, (IDS,))
    assert gap(traced(OTHERS), model(OTHERS)) < 1e-5
    assert "PythonOp" not in str(traced.inlined_graph)
    assert "lora_lightning::" not in str(traced.inlined_graph)


def test_a_row_of_zeros_exports_as_zeros():
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.zeros_(model.down.weight[2:3])
    attach(model, METHODS["dora"])
    answer = exported(model).module()(OTHERS)
    assert answer.isfinite().all()
    assert gap(answer, model(OTHERS)) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("method", "dynamo"), [*((one, True) for one in METHODS), ("lora", False), ("dora", False)])
def test_onnx(method, dynamo):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is an extra for developers")
    check_onnx(adapted(method), dynamo=dynamo)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx_of_copies_and_statistics():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is an extra for developers")
    check_onnx(adapted("lora", train_norm_statistics=True), dynamo=True)
    torch.manual_seed(0)
    model = Net().eval()
    attach(model, LoRA(r=2, target_modules=["up"]), modules_to_save=["down"])
    check_onnx(perturb(model, std=0.3), dynamo=True)


def check_onnx(model, *, dynamo):
    """Export a model and compare what onnxruntime answers on rows of another number and length."""
    import onnxruntime

    if dynamo:
        axes = {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("length", min=1, max=512)}
        content = torch.onnx.export(model, (IDS,), dynamo=True, verbose=False, dynamic_shapes=(axes,))
        file = content.model_proto.SerializeToString()
    else:
        stream = io.BytesIO()
        axes = {"ids": {0: "rows", 1: "length"}}
        torch.onnx.export(model, (IDS,), stream, dynamo=False, input_names=["ids"], dynamic_axes=axes)
        file = stream.getvalue()
    session = onnxruntime.InferenceSession(file)
    (answer,) = session.run(None, {session.get_inputs()[0].name: OTHERS.numpy()})
    assert gap(torch.from_numpy(answer), model(OTHERS)) < 1e-4
