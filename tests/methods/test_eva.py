"""EVA: A starts at the main directions of the inputs, compared with a full SVD in float64."""

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import attach, iter_adapters
from lora_lightning.backbones.attach import attach as attach_backbone
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.methods import DoRA, LoRA, LoRADrop
from lora_lightning.methods.eva import NUM_BATCHES, MainDirections
from tests import models
from tests.tasks.toys import Tagger, loader, trainer


def overlap(ours: Tensor, reference: Tensor) -> float:
    """Return the smallest cosine between two spaces spanned by orthonormal rows."""
    return float(torch.linalg.svdvals(ours.double() @ reference.double().t()).min())


def stretched(num: int, width: int) -> Tensor:
    """Return rows whose singular values fall off."""
    torch.manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(width, width))
    return torch.randn(num, width) * 0.7 ** torch.arange(width) @ basis


def test_directions_equal_a_full_svd():
    x = stretched(240, 20)
    _, _, expected = torch.linalg.svd(x.double(), full_matrices=False)
    whole, parts = MainDirections(4), MainDirections(4)
    whole.add(x)
    for part in x.view(6, 8, 5, 20):
        parts.add(part)
    for found, tolerance in ((whole, 1e-5), (parts, 1e-2)):
        directions = found.directions()
        assert models.gap(directions @ directions.t(), torch.eye(4)) <= 1e-5
        assert overlap(directions, expected[:4]) >= 1 - tolerance
        assert overlap(directions, expected[1:5]) < 0.5
    cosines = (whole.directions().double() * expected[:4]).sum(1).abs()
    assert cosines.min() > 1 - 1e-5  # in the order of the singular values too


def test_few_rows_give_few_directions():
    found = MainDirections(4)
    found.add(torch.ones(5, 8))
    assert found.directions().shape == (1, 8)
    found.add(torch.eye(8)[:1])
    assert found.directions().shape == (2, 8)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_starts_at_the_inputs_of_each_host(kind):
    model = models.build("bert")
    base = models.logits(model)
    method = kind(r=3, init="eva", target_modules=["query", "output.dense"], dropout=0.2)
    attach_backbone(model, method)
    drawn = {path: adapter.lora_A.clone() for path, _, adapter in iter_adapters(model)}
    inputs: dict[str, list[Tensor]] = {path: [] for path in drawn}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for path, seen in inputs.items()
    ]
    parameters = [id(parameter) for parameter in model.parameters()]
    model.train()
    batches = [models.inputs(model, seed=seed) for seed in range(NUM_BATCHES + 2)]
    method.calibrate(model, batches, lambda batch: model(**batch).logits.sum())
    for handle in handles:
        handle.remove()
    assert all(module.training for module in model.modules())
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for path, _, adapter in iter_adapters(model):
        assert len(inputs[path]) == NUM_BATCHES
        seen = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[path]]).double()
        _, _, expected = torch.linalg.svd(seen, full_matrices=False)
        # What the truncation loses shows in how much of the inputs is explained.
        explained = [(seen @ a.double().t()).square().sum() for a in (adapter.lora_A, expected[:3])]
        assert explained[0] / explained[1] > 0.98
        orthogonal, _ = torch.linalg.qr(drawn[path].double().t())
        assert (seen @ orthogonal).square().sum() / explained[1] < 0.9
        assert not adapter.lora_B.any()
    assert models.gap(models.logits(model.eval()), base) <= 1e-6


def test_before_calibration_it_is_kaiming():
    models_of = []
    for init in ("eva", "kaiming"):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(8, 6))
        attach(model, LoRA(r=2, init=init))
        models_of.append(model)
    ours, theirs = [next(adapter for _, _, adapter in iter_adapters(model)) for model in models_of]
    assert torch.equal(ours.lora_A, theirs.lora_A)


def test_other_inits_touch_no_data():
    def batches():
        raise AssertionError("data was touched")
        yield

    model = nn.Sequential(nn.Linear(8, 6))
    attach(model, LoRA(r=2))
    LoRA(r=2).calibrate(model, batches(), model)
    assert not LoRA(r=2).calibrates
    assert LoRA(init="eva").calibrates
    assert LoRADrop().calibrates


def test_fit():
    task = Tagger(method=LoRA(r=4, init="eva", target_modules=["linear1", "linear2"]))
    trained = trainer(max_steps=1, max_epochs=1)
    task.configure_model()
    drawn = {path: adapter.lora_A.clone() for path, _, adapter in iter_adapters(task.model)}
    trained.fit(task, loader())
    for path, _, adapter in iter_adapters(task.model):
        gram = adapter.lora_A @ adapter.lora_A.t()
        assert models.gap(gram, torch.eye(4)) <= 1e-2  # the first step moves A by nothing, since B is zero
        assert models.gap(drawn[path] @ drawn[path].t(), torch.eye(4)) > 1e-1


class Start:
    """An adapter to start from, with every parameter 0.5."""

    def check_labels(self, *args) -> None: ...

    def load_own(self, task) -> None: ...

    @torch.no_grad()
    def load_into(self, model: nn.Module, methods, tokenizer) -> None:
        for _, _, adapter in iter_adapters(model):
            for parameter in adapter.parameters():
                parameter.fill_(0.5)


def test_a_loaded_adapter_does_not_start_anew(monkeypatch):
    monkeypatch.setattr("lora_lightning.tasks.base.read_starting_adapter", lambda *_: Start())
    task = Tagger(method=LoRA(r=4, init="eva", target_modules=["linear1"]), adapter="folder", optim={"lr": 1e-6})
    trainer(max_steps=1, max_epochs=1).fit(task, loader())
    assert all((adapter.lora_A - 0.5).abs().max() < 1e-3 for _, _, adapter in iter_adapters(task.model))


class Half(nn.Module):
    """Calls one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_mistakes():
    method = LoRA(r=2, init="eva")
    model = Half()
    attach(model, method)
    with pytest.raises(DataError, match="no batch"):
        method.calibrate(model, [], model)
    with pytest.raises(ConfigError, match="'idle', and the model did not call it"):
        method.calibrate(model, [torch.ones(2, 4)], model)
    with pytest.raises(ConfigError, match="'used' are not finite"):
        method.calibrate(model, [torch.full((2, 4), float("nan"))], model)
    with pytest.raises(ConfigError, match="init='eva' is defined for linear layers, and '0' is an embedding"):
        attach(nn.Sequential(nn.Embedding(8, 6)), LoRA(r=2, init="eva", target_modules=["0"]))
    with pytest.raises(ConfigError, match="init must be one of"):
        LoRADrop(init="eva")
