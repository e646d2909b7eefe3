"""LoRA-drop: what it measures, which hosts it keeps, and that sharing survives states and checkpoints."""

import copy

import pytest
import torch
from torch import nn

from lora_lightning.adapters import (
    adapter_state_dict,
    attach,
    iter_adapters,
    iter_roles,
    load_adapter_state_dict,
    merge,
)
from lora_lightning.callbacks import AdapterSummary
from lora_lightning.errors import CheckpointError, ConfigError, DataError
from lora_lightning.methods import LoRA, LoRADrop
from lora_lightning.methods.lora_drop import most_important
from tests import models
from tests.tasks.toys import Tagger, loader, trainer


class Tower(nn.Module):
    """Four blocks of two layers; the later a block, the smaller what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(4))
        self.head = nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        outputs = []
        for index, block in enumerate(self.blocks):
            outputs.append(block["down"](block["up"](x * 0.5**index).tanh()))
        return self.head(self.norm(torch.stack(outputs).sum(0)))


METHOD = LoRADrop(
    r=2, target_modules=["up", "down"], calibration_steps=5, sample_batches=2, threshold=0.8, modules_to_save=["head"]
)


def tower() -> nn.Module:
    torch.manual_seed(0)
    model = Tower()
    attach(model, METHOD)
    return model.train()


def batches() -> list[torch.Tensor]:
    return list(torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1)))


def loss_of(model: nn.Module):
    return lambda x: (model(x) - 1).square().mean()


def calibrated() -> nn.Module:
    model = tower()
    METHOD.calibrate(model, batches(), loss_of(model))
    return model


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    return {path: adapter for path, _, adapter in iter_adapters(model) if hasattr(adapter, "shared")}


def shared(model: nn.Module) -> dict[str, bool]:
    return {path: adapter.shared is not None for path, adapter in adapters(model).items()}


def num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for _, parameter, _ in iter_roles(model) if parameter.requires_grad)


def test_the_importance_is_the_formula():
    model = models.perturb(tower()).double().eval()
    sample = [x.double() for x in batches()[:2]]
    inputs = {path: [] for path in adapters(model)}
    for path, values in inputs.items():
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, values=values: values.append(args[0]))
    shares = METHOD._measure(model, sample, loss_of(model))
    sums = [
        sum((adapter.scaling * x @ adapter.lora_A.t() @ adapter.lora_B.t()).square().sum() for x in inputs[path])
        for path, adapter in adapters(model).items()
    ]
    expected = torch.stack(sums) / sum(sums)
    assert models.gap(shares, expected) <= 1e-12
    assert models.gap(shares, expected.flip(0)) > 1e-2
    first = [x[:1] for x in sample]
    assert models.gap(METHOD._measure(model, first, loss_of(model)), expected) > 1e-4


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.3, {1}), (0.5, {1}), (0.51, {1, 3}), (0.8, {1, 3}), (0.95, {0, 1, 3}), (1, {0, 1, 2, 3})]
)
def test_which_hosts_are_kept(threshold, kept):
    assert most_important([0.15, 0.5, 0.05, 0.3], threshold) == kept


def test_calibration_keeps_the_most_important(monkeypatch):
    measured = []
    measure = LoRADrop._measure
    monkeypatch.setattr(LoRADrop, "_measure", lambda *args: measured.append(measure(*args)) or measured[-1])
    model = tower()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = num_trainable(model)
    METHOD.calibrate(model, batches(), loss_of(model))

    kept = most_important(measured[0].tolist(), 0.8)
    assert 0 < len(kept) < 7
    assert [not value for value in shared(model).values()] == [index in kept for index in range(8)]
    groups = {(path.split(".")[-1], id(one.shared)) for path, one in adapters(model).items() if one.shared is not None}
    assert len(groups) == len({name for name, _ in groups})  # one module for all `up`, one for all `down`
    assert num_trainable(model) == total - (8 - len(kept) - len(groups)) * (6 + 8) * 2
    assert not any(adapter.factors()[1].any() for adapter in adapters(model).values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for path, module in model.named_modules() if path != "norm")  # frozen with the base
    after = model.state_dict()
    rest = [name for name in before if "lora_A" not in name and "lora_B" not in name]
    assert any("head" in name for name in rest)
    assert "norm.running_mean" in rest
    assert all(torch.equal(after[name], before[name]) for name in rest)


def test_shared_factors_compute_like_plain_lora():
    model = models.perturb(calibrated()).eval()
    assert 0 < sum(shared(model).values()) < 8
    torch.manual_seed(0)
    plain = Tower().eval()
    attach(plain, LoRA(r=2, target_modules=["up", "down"]))
    x = batches()[0]
    with torch.no_grad():
        for path, _, adapter in iter_adapters(plain):
            for mine, theirs in zip(adapters(model)[path].factors(), adapter.factors(), strict=True):
                theirs.copy_(mine)
    state = adapter_state_dict(model)
    plain.head.load_state_dict({name: state[f"head.{name}"] for name in ("weight", "bias")}, strict=False)
    plain.norm.load_state_dict(model.norm.state_dict())
    assert models.gap(model(x), plain(x)) <= 1e-6
    with torch.no_grad():
        next(adapter for _, _, adapter in iter_adapters(plain)).lora_B[0, 0] += 1
    assert models.gap(model(x), plain(x)) > 1e-4
    expected = model(x)
    merge(model)
    assert models.gap(model(x), expected) <= 1e-6


def test_shared_factors_are_reset_together():
    model = models.perturb(calibrated())
    one, other = [adapter for adapter in adapters(model).values() if adapter.shared is not None][-2:]
    factors = one.shared
    one.reset_parameters()
    assert one.shared is factors
    assert not factors.lora_B.any()
    assert (other.shared is factors) == (not other.factors()[1].any())


def test_state_round_trip():
    first = models.perturb(calibrated()).eval()
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(first).items()}
    assert sum("shared" in name for name in state) <= 4
    torch.manual_seed(9)
    second = tower().eval()
    x = batches()[0]
    load_adapter_state_dict(second, state)
    assert shared(second) == shared(first)
    assert torch.equal(second(x), first(x))
    assert adapter_state_dict(second).keys() == state.keys()
    held = list(second.parameters())
    load_adapter_state_dict(second, state)
    assert all(one is other for one, other in zip(second.parameters(), held, strict=True))

    fresh = tower().eval()
    whole = {name: tensor.clone() for name, tensor in adapter_state_dict(models.perturb(fresh)).items()}
    load_adapter_state_dict(second, whole)  # back to factors of its own on every host
    assert torch.equal(second(x), fresh(x))
    some = next(name for name in state if name.endswith("shared.lora_A"))
    with pytest.raises(CheckpointError, match="missing"):
        load_adapter_state_dict(second, {name: tensor for name, tensor in state.items() if name != some})


def test_copies_keep_the_sharing():
    model = calibrated()
    other = copy.deepcopy(model)
    assert len(list(other.parameters())) == len(list(model.parameters()))
    assert shared(other) == shared(model)


def test_two_in_one_list_keep_to_their_own():
    settings = {"r": 2, "calibration_steps": 3, "sample_batches": 2}
    first = LoRADrop(**settings, target_modules=["up"], threshold=1.0)
    second = LoRADrop(**settings, target_modules=["down"], threshold=0.1)
    torch.manual_seed(0)
    model = Tower()
    attach(model, [first, second])
    ups = {name: one.detach().clone() for name, one in model.named_parameters() if "up" in name}
    second.calibrate(model, batches(), loss_of(model))
    assert sum(shared(model).values()) == 3
    assert all(torch.equal(one, ups[name]) for name, one in model.named_parameters() if "up" in name)
    downs = {name: one.detach().clone() for name, one in model.named_parameters() if "down" in name}
    first.calibrate(model, batches(), loss_of(model))
    assert shared(model).items() >= {f"blocks.{index}.up": False for index in range(4)}.items()
    assert sum(shared(model).values()) == 3
    assert all(torch.equal(one, downs[name]) for name, one in model.named_parameters() if "down" in name)
    state = adapter_state_dict(models.perturb(model))
    other = Tower()
    attach(other, [first, second])
    load_adapter_state_dict(other, state)
    assert shared(other) == shared(model)


# The resumed run is complete, and only loads.
@pytest.mark.filterwarnings("ignore:Nothing was trained")
def test_fit_and_resume(tmp_path, capsys):
    method = LoRADrop(
        r=2, target_modules=["linear1", "linear2"], calibration_steps=6, sample_batches=2, threshold=0.1, dropout=0.1
    )
    task = Tagger(method=method)
    trained = trainer(default_root_dir=tmp_path, max_epochs=1, callbacks=[AdapterSummary()])
    trained.fit(task, loader())
    assert sum(shared(task.model).values()) == 3
    fresh = Tagger(method=method)
    fresh.configure_model()
    assert num_trainable(task.model) == task.report.num_trainable < fresh.report.num_trainable
    assert f"{task.report.num_trainable:,}" in capsys.readouterr().out  # of the table
    assert task.report.hosts == fresh.report.hosts
    optimized = sum(p.numel() for group in trained.optimizers[0].param_groups for p in group["params"])
    assert optimized == num_trainable(task.model)
    assert all(adapter.factors()[1].any() for adapter in adapters(task.model).values())
    path = tmp_path / "end.ckpt"
    trained.save_checkpoint(path)
    again = Tagger(method=method)
    trainer(default_root_dir=tmp_path, max_epochs=1).fit(again, loader(), ckpt_path=path)
    assert shared(again.model) == shared(task.model)
    assert again.report == task.report
    state = adapter_state_dict(task.model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state_dict(again.model).items())


def test_mistakes_in_the_data():
    model = tower()
    with pytest.raises(DataError, match="no batch"):
        METHOD.calibrate(model, [], loss_of(model))
    with pytest.raises(ConfigError, match="squared norms sum to 0"):
        METHOD.calibrate(model, batches(), lambda x: model(x).sum() * 0)
    assert not any(shared(model).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0}, "threshold must be a finite number above 0"),
        ({"threshold": 1.5}, "threshold is a share"),
        ({"calibration_steps": 0}, "calibration_steps must be"),
        ({"calibration_lr": -1.0}, "calibration_lr must be"),
        ({"sample_batches": 0}, "sample_batches must be"),
        ({"init": "orthogonal"}, "init must be one of"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoRADrop(**settings)
