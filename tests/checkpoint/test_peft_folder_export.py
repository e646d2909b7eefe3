"""Relatives of LoRA are exported as the LoRA that computes the same, and their own folders load into themselves."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning.adapters import Adapter, Method, ModelView, adapter_state_dict, attach, folded_state_dict
from lora_lightning.backbones.attach import attach as attach_to_backbone
from lora_lightning.checkpoint import export_peft, load_adapter, load_peft, write_adapter_folder
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.methods.dora import DoRAAdapter
from lora_lightning.methods.low_rank import LowRankAdapter
from lora_lightning.methods.prefix import Prefix
from lora_lightning.methods.prompt_tuning import SoftPrompt
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME
from lora_lightning.peft_format.export import for_peft
from tests.adapters.toys import Bias, Model, Scale
from tests.contract.examples import CASES as CONTRACT_CASES
from tests.models import build, perturb


class FromStart(LowRankAdapter):
    """W + s (B A - B0 A0) with frozen A0 and B0."""

    def __init__(self, host: nn.Module, **settings: object) -> None:
        super().__init__(host, **settings)  # type: ignore[arg-type]
        nn.init.normal_(self.lora_B)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)


class DoRAFromStart(DoRAAdapter, FromStart):
    """The same, with a magnitude."""


class Pruned(LowRankAdapter):
    """B diag(v) A with some zeros in v, different ones in each layer."""

    def __init__(self, host: nn.Module, *, v: Tensor, **settings: object) -> None:
        super().__init__(host, **settings)  # type: ignore[arg-type]
        self.register_buffer("v", v)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B * self.v


class Shared(LowRankAdapter):
    """Takes its factors from a module that all hosts share."""

    def __init__(self, host: nn.Module, *, shared: LowRankAdapter, **settings: object) -> None:
        super().__init__(host, **settings)  # type: ignore[arg-type]
        self.lora_A, self.lora_B = shared.lora_A, shared.lora_B


class Cubed(LowRankAdapter):
    """W + s (B A)³, elementwise, which is of no low rank."""

    def merged_weight(self, host: nn.Module, weight: Tensor) -> Tensor:
        del host
        return weight + self.scaling * (self.lora_B @ self.lora_A) ** 3


@dataclass(frozen=True, kw_only=True)
class Relative(LoRA):
    """Builds the adapters of one of the classes above."""

    name: ClassVar[str] = "relative"
    kind: str = "start"

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        self.__dict__.pop("_shared", None)
        yield from super().adapters(view)

    def build(self, path: str, host: nn.Module) -> Adapter:
        r, scaling = self.rank_and_scaling(path)
        settings = {"r": r, "scaling": scaling}
        if self.kind == "pruned":
            v = torch.ones(r)
            v[: 1 + ("1" in path)] = 0
            return Pruned(host, v=v, **settings)
        if self.kind == "shared":
            shared = self.__dict__.setdefault("_shared", LowRankAdapter(host, **settings))
            return Shared(host, shared=shared, **settings)
        kinds = {"start": FromStart, "dora": DoRAFromStart, "cubed": Cubed}
        return kinds[self.kind](host, **settings)


CASES: dict[str, tuple[str, Relative, set[int]]] = {
    "start": ("bert", Relative(r=3, alpha=5, target_modules=["query", "output.dense"]), {6}),
    "start-rslora": ("gpt2", Relative(r=3, scaling="rslora", target_modules=["c_attn"]), {6}),
    "start-of-full-rank": ("bert", Relative(r=20, alpha=20, target_modules=["query", "intermediate.dense"]), {32}),
    "start-embedding": ("bert", Relative(r=3, target_modules=["word_embeddings"]), {3}),
    "start-conv": ("conv", Relative(r=2, target_modules=["conv"]), {4}),
    "dora": ("llama", Relative(r=3, alpha=5, kind="dora", target_modules=["q_proj", "down_proj"]), {6}),
    "pruned": ("bert", Relative(r=4, alpha=5, kind="pruned", target_modules=["query", "value"]), {2, 3}),
    "shared": ("bert", Relative(r=3, kind="shared", target_modules=["query", "value"]), {3}),
}


def trained(build_model: Callable[..., nn.Module], name: str, method: Method) -> nn.Module:
    torch.manual_seed(1)
    model = build_model(name)
    attach(model, method, modules_to_save=[] if name in ("gpt2", "llama") else ["classifier"])
    v = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".v")}
    perturb(model)
    for name, buffer in model.named_buffers():
        if name in v:
            buffer.copy_(v[name])
    return model


def load_with_peft(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own hints about fan_in_fan_out and tied weights
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(
    case: str, tmp_path: Path, build_model: Callable[..., nn.Module], logits: Callable[..., Tensor]
) -> None:
    name, method, ranks = CASES[case]
    model = trained(build_model, name, method)
    manifest = export_peft(model, tmp_path / "peft")
    assert manifest.adapter_format == "peft"
    assert [one["class_path"].rpartition(".")[2] for one in manifest.methods] == ["DoRA" if case == "dora" else "LoRA"]
    tensors = load_file(tmp_path / "peft" / PEFT_WEIGHTS_NAME)
    assert {len(one) for key, one in tensors.items() if "lora_A" in key or "embedding_A" in key} == ranks

    torch.manual_seed(99)
    fresh = load_with_peft(build_model(name), tmp_path / "peft")
    expected = logits(model)
    torch.testing.assert_close(logits(fresh), expected, atol=1e-5, rtol=0)

    for key, one in tensors.items():  # negative control: one component less in each layer
        if "lora_A" in key or "embedding_A" in key:
            one[-1] = 0
    save_file(tensors, tmp_path / "peft" / PEFT_WEIGHTS_NAME)
    fresh = load_with_peft(build_model(name), tmp_path / "peft")
    assert (logits(fresh) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_exported_folder_comes_back_as_lora(
    case: str, tmp_path: Path, build_model: Callable[..., nn.Module], logits: Callable[..., Tensor]
) -> None:
    name, method, _ = CASES[case]
    model = trained(build_model, name, method)
    export_peft(model, tmp_path / "peft")
    torch.manual_seed(99)
    fresh = build_model(name)
    load_peft(fresh, tmp_path / "peft")
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"was trained with .*, and the model has .*Relative"):
        load_adapter(model, tmp_path / "peft")


@pytest.mark.parametrize("case", CASES)
def test_folder_beside_a_checkpoint_goes_back_into_the_same_method(
    case: str, tmp_path: Path, build_model: Callable[..., nn.Module], logits: Callable[..., Tensor]
) -> None:
    name, method, _ = CASES[case]
    model = trained(build_model, name, method)
    assert write_adapter_folder(tmp_path / "own", model).adapter_format == "lora_lightning"
    torch.manual_seed(99)
    fresh = build_model(name)
    attach(fresh, method, modules_to_save=[] if name in ("gpt2", "llama") else ["classifier"])
    assert (logits(fresh) - logits(model)).abs().max() > 1e-3  # negative control
    load_adapter(fresh, tmp_path / "own")
    torch.testing.assert_close(logits(fresh), logits(model), atol=0, rtol=0)
    assert adapter_state_dict(fresh).keys() == adapter_state_dict(model).keys()


def test_several_relatives_become_one_lora(
    tmp_path: Path, build_model: Callable[..., nn.Module], logits: Callable[..., Tensor]
) -> None:
    model = build_model("bert")
    methods = [
        LoRA(r=2, alpha=3, target_modules=["value"]),
        Relative(r=3, alpha=5, target_modules=["query"]),
    ]
    attach(model, methods, modules_to_save=["classifier"])
    perturb(model)
    export_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / CONFIG_NAME).read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {2, 6}
    fresh = load_with_peft(build_model("bert"), tmp_path / "peft")
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=0)


def test_an_update_of_zero_has_rank_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, Relative(r=3, kind="pruned", target_modules=["0"]))  # B starts at zero
    export_peft(model, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / CONFIG_NAME).read_text())["r"] == 1


def test_plain_lora_keeps_rank_and_words(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    method = LoRA(r=3, target_modules=["0"])
    attach(model, method)  # B is zero here too
    assert export_peft(model, tmp_path / "peft").methods[0]["init_args"]["target_modules"] == ["0"]
    assert json.loads((tmp_path / "peft" / CONFIG_NAME).read_text())["r"] == 3
    load_adapter(copy.deepcopy(model), tmp_path / "peft")


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ([Relative(kind="cubed", r=2, target_modules=["query"])], r"no words for Relative \(at 'layer.0.query'\)"),
        ([Scale(target_modules=["query"])], r"no words for Scale \(.*\. Use the adapter folder beside the checkpoint"),
        (
            [LoRA(r=2, target_modules=["value"]), Bias(target_modules=["query"])],
            r"one method, and LoRA and Bias are .*Merge it into the base instead",
        ),
        (
            [LoRA(r=2, target_modules=["value"]), DoRA(r=2, target_modules=["query"])],
            "holds LoRA or DoRA, and LoRA and DoRA are attached",
        ),
        (
            [DoRA(r=2, target_modules=["query"], magnitude_axis="input")],
            "one magnitude per output, and this one has magnitude_axis='input'",
        ),
    ],
)
def test_what_peft_cannot_hold_says_why(methods: list[Method], reason: str, tmp_path: Path) -> None:
    model = Model()
    attach(model, methods)
    with pytest.raises(CheckpointError, match=reason):
        export_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    assert write_adapter_folder(tmp_path / "own", model).adapter_format == "lora_lightning"


@pytest.mark.parametrize("case", CONTRACT_CASES)
def test_methods_of_the_package(case: str, tmp_path: Path, logits: Callable[..., Tensor]) -> None:
    example, architecture = CONTRACT_CASES[case]
    model = build(architecture)
    attach_to_backbone(model, example.method)
    perturb(model)
    write_adapter_folder(tmp_path / "own", model)
    if for_peft(model, folded_state_dict(model)) is None:
        with pytest.raises(CheckpointError, match=r"cannot be written in PEFT's format: .*PEFT"):
            export_peft(model, tmp_path / "peft")
    elif isinstance(
        example.method, SoftPrompt | Prefix
    ):  # PEFT puts them before the padding on the left: see test_kinds
        export_peft(model, tmp_path / "peft")
    else:
        export_peft(model, tmp_path / "peft")
        fresh = load_with_peft(build(architecture), tmp_path / "peft")
        torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=0)

    torch.manual_seed(99)
    again = build(architecture)
    attach_to_backbone(again, example.method)
    assert (logits(again) - logits(model)).abs().max() > 1e-4  # negative control
    load_adapter(again, tmp_path / "own")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
