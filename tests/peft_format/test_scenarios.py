"""What PEFT's users do beside the usual: biases, ties, single parameters, copies, wide ranks; each both ways."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lightning import methods as ours
from lora_lightning.adapters import iter_adapters
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint import export_peft, load_peft
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.config import PEFT_WEIGHTS_NAME
from tests.peft_format.kinds import answers, build_model, move

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own hints, of ties, fan_in_fan_out and embeddings

LoRA, AdaLoRA, VeRA, IA3, Tokens = (
    peft.LoraConfig,
    peft.AdaLoraConfig,
    peft.VeraConfig,
    peft.IA3Config,
    peft.TrainableTokensConfig,
)


class Images(nn.Module):
    """Convolutions and norms, as a model of the user's own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.conv, self.norm, self.groups = nn.Conv2d(3, 8, 3, **settings), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.flat, self.lin = nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.flat(self.groups(self.norm(self.conv(x)).relu()).flatten(2)).mean(2))


class Twice(nn.Module):
    """One layer that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.first = nn.Linear(4, 4)
        self.second, self.last = self.first, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


class Encoder(nn.Module):
    """Torch's own encoder layer, with a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.encoder, self.last = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x))


class Bare(nn.Module):
    """A module that computes with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked, self.matrix = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x @ self.matrix.t(), self.stacked)


class Around(nn.Module):
    """A model with a `Bare` inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.bare, self.lin = Bare(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.bare(x))


def llama(*, tie: bool = False, resized: int | None = None) -> Callable[[], nn.Module]:
    """Return the builder of a Llama; rows beyond the vocabulary are drawn anew in each model."""

    def builder() -> nn.Module:
        config = build_model("llama").config
        config.tie_word_embeddings = tie
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        if resized is not None:
            torch.manual_seed(torch.seed() % 1000)
            model.resize_token_embeddings(resized, mean_resizing=False)
        return model

    return builder


def masked() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(build_model("bert").config).eval()


@torch.no_grad()
def called(model: nn.Module) -> Tensor:
    """Return what a model of the user's own answers."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, 8, 8) if isinstance(model, Images) or isinstance(base_of(model), Images) else (3, 8)
    if isinstance(base_of(model), Twice):
        shape = (3, 4)
    return model(torch.randn(shape, generator=generator))


def base_of(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scenario.

    Args:
        build: Builds the base.
        config: PEFT's.
        answer: Returns a model's answers.
        save: Arguments of PEFT's `save_pretrained`.
    """

    build: Callable[[], nn.Module]
    config: Callable[[], Any]
    answer: Callable[[nn.Module], Tensor] = answers
    save: dict[str, Any] = field(default_factory=dict)


def of(model: str, config: Any, **settings: Any) -> Case:
    return Case(build=lambda: build_model(model), config=lambda: config(**settings))


def on(build: Callable[[], nn.Module], config: Any, *, save: dict[str, Any] | None = None, **settings: Any) -> Case:
    is_own = isinstance(build, type)
    made = (lambda: build().eval()) if is_own else build
    return Case(build=made, config=lambda: config(**settings), answer=called if is_own else answers, save=save or {})


BERT = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
TIES = {
    f"{name}, {'tied' if tie else 'not tied'}": on(llama(tie=tie), LoRA, r=2, save=save, **settings)
    for tie in (True, False)
    for name, settings, save in (
        ("both copied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, {}),
        (
            "both copied twice",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"save_embedding_layers": True},
        ),
        (
            "copy with its tie",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            {},
        ),
        ("target with its tie", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, {}),
        ("both targets", {"target_modules": ["embed_tokens", "lm_head"]}, {}),
        ("base beside", {"target_modules": ["q_proj"]}, {"save_embedding_layers": True}),
        ("tokens by name", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 5]}}, {}),
    )
}
CASES: dict[str, Case] = {
    "bias all": of("bert", LoRA, r=2, bias="all", **BERT),
    "bias lora_only": of("bert", LoRA, r=2, bias="lora_only", **BERT),
    "bias all, conv1d": of("gpt2", LoRA, r=2, bias="all", target_modules=["c_attn"], fan_in_fan_out=True),
    "bias and dora": of("bert", LoRA, r=2, bias="all", use_dora=True, **BERT),
    "both biases": of("bert", LoRA, r=2, bias="all", lora_bias=True, **BERT),
    "bias of a masked lm": on(masked, LoRA, r=2, bias="all", target_modules=["query"]),
    "bias of images": on(Images, LoRA, r=2, bias="all", target_modules=["conv", "flat", "lin"]),
    "lora_bias of images": on(Images, LoRA, r=2, lora_bias=True, target_modules=["conv", "lin"]),
    "dora of images": on(Images, LoRA, r=2, use_dora=True, target_modules=["conv", "flat"]),
    "adalora of images": on(Images, AdaLoRA, init_r=2, target_r=1, total_step=5, target_modules=["conv", "lin"]),
    "adalora, bias, tokens": of("bert", AdaLoRA, init_r=3, target_r=2, total_step=5, bias="all", **BERT),
    "adalora, tokens": of(
        "llama", AdaLoRA, init_r=3, target_r=2, total_step=5, target_modules="all-linear", trainable_token_indices=[5]
    ),
    "vera, bias": of("bert", VeRA, r=4, bias="vera_only", **BERT),
    "vera, drawn": of("gpt2", VeRA, r=4, save_projection=False, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "vera, layers": of("llama", VeRA, r=4, projection_prng_key=7, target_modules=["q_proj"], layers_to_transform=[0]),
    "ia3 of a fused layer": of("gpt2", IA3, task_type="CAUSAL_LM", fan_in_fan_out=True),
    "ia3 of inputs": of("llama", IA3, target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "ia3 by pattern": of("llama", IA3, target_modules=r".*(k|down)_proj", feedforward_modules=r".*0\.mlp\.down_proj"),
    "ia3 and a copy": of("llama", IA3, target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
    "single parameters": on(
        Around, LoRA, r=2, target_modules=["lin"], target_parameters=["bare.stacked", "bare.matrix"]
    ),
    "all-linear of a mixture": of("mixtral", LoRA, r=2, target_modules="all-linear"),
    "a router": of("qwen3_moe", LoRA, r=2, target_modules=[], target_parameters=["gate.weight", "experts.down_proj"]),
    "transposed experts": of("gpt_oss", LoRA, r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]),
    "weights of layers": of(
        "gpt2", LoRA, r=2, target_modules=[], target_parameters=["c_attn.weight", "attn.c_proj.weight", "wte.weight"]
    ),
    "wide": of("llama", LoRA, r=40, target_modules=["q_proj", "k_proj", "embed_tokens"]),
    "wide dora": of("llama", LoRA, r=40, target_modules=["k_proj"], use_dora=True),
    "wide adalora": of("llama", AdaLoRA, init_r=40, target_r=20, total_step=5, target_modules=["k_proj"]),
    "layers by pattern": of(
        "llama", LoRA, r=2, target_modules=["q_proj"], layers_to_transform=1, layers_pattern=["layers", "h"]
    ),
    "tokens of both": on(llama(), Tokens, token_indices=[9, 5], target_modules=["embed_tokens", "lm_head"]),
    "prompt and a copy": of(
        "llama", peft.PromptTuningConfig, num_virtual_tokens=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    ),
    "lstm": of(
        "llama",
        peft.PromptEncoderConfig,
        num_virtual_tokens=2,
        task_type="CAUSAL_LM",
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
    ),
    **TIES,
}
ROW_CASES = {
    f"{name}, {'tied' if tie else 'not tied'}": on(llama(tie=tie, resized=72), LoRA, r=2, save=save, **settings)
    for tie in (True, False)
    for name, settings, save in (
        ("embeddings beside", {"target_modules": ["q_proj"]}, {"save_embedding_layers": True}),
        (
            "copies",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"save_embedding_layers": True},
        ),
    )
}


def trained(case: Case, folder: Path) -> tuple[Any, Tensor]:
    theirs = peft.get_peft_model(case.build(), case.config()).eval()
    move(theirs)
    theirs.save_pretrained(folder, **case.save)
    return theirs, case.answer(theirs)


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, expected = trained(case, tmp_path / "theirs")
    model = case.build()
    base = case.answer(model)
    load_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(case.answer(model), expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 1e-3  # negative control

    export_peft(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(case.build(), tmp_path / "ours").eval()
    torch.testing.assert_close(case.answer(again), expected, atol=1e-5, rtol=0)
    back = case.build()
    load_peft(back, tmp_path / "ours")
    torch.testing.assert_close(case.answer(back), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ROW_CASES)
def test_a_vocabulary_that_was_extended(name: str, tmp_path: Path) -> None:
    """New rows are drawn at random in each base; the file's take their place."""
    case = ROW_CASES[name]
    _, expected = trained(case, tmp_path)
    model = case.build()
    assert not torch.equal(model.get_input_embeddings().weight[64:], case.build().get_input_embeddings().weight[64:])
    load_peft(model, tmp_path)
    torch.testing.assert_close(case.answer(model), expected, atol=1e-5, rtol=0)
    small = llama(tie=name.endswith(", tied"))()
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings\(72\)|another shape"):
        load_peft(small, tmp_path)


REFUSED: dict[str, tuple[Case, str]] = {
    "padding": (
        on(lambda: Images(padding_mode="reflect", padding=1).eval(), LoRA, target_modules=["conv"]),
        "padding_m",
    ),
    "groups": (
        on(lambda: Images(groups=1).eval(), IA3, target_modules=["conv"], feedforward_modules=[]),
        "linear layers",
    ),
    "shared": (on(Twice, LoRA, target_modules=["first"]), "stands in several places"),
    "shared copy": (on(Twice, LoRA, target_modules=["last"], modules_to_save=["first"]), "stands in several places"),
    "fast layer": (on(Encoder, LoRA, target_modules=["linear1"]), "reads weights past PEFT's adapters"),
    "other rows": (
        on(
            llama(tie=True),
            LoRA,
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [9, 5], "lm_head": [1]},
        ),
        "other rows than these",
    ),
    "head rows": (on(llama(tie=True), Tokens, token_indices=[9], target_modules=["lm_head"]), "other rows than these"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_computes_otherwise(name: str, tmp_path: Path) -> None:
    case, reason = REFUSED[name]
    theirs = peft.get_peft_model(case.build(), case.config())
    move(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        load_peft(case.build(), tmp_path)


@pytest.mark.parametrize(
    ("build", "target", "reason"),
    [
        (lambda: Images(padding_mode="circular", padding=1), "conv", "padding_mode='circular'"),
        (lambda: Images(dilation=2), "conv", r"leaves out the dilation .*\(2, 2\)"),
        (Twice, "first", "stands in several places"),
        (Encoder, "linear1", "reads weights past PEFT's adapters"),
    ],
)
@pytest.mark.parametrize("method", [ours.LoRA(r=2), ours.DoRA(r=2), ours.AdaLoRA(target_r=1, init_r=2)])
def test_what_peft_would_compute_otherwise(
    build: Callable[[], nn.Module], target: str, reason: str, method: Any, tmp_path: Path
) -> None:
    for own_kind in (False, True):
        model = build()
        attach(model, dataclasses.replace(method, target_modules=[target]))
        with pytest.raises(CheckpointError, match=reason):
            export_peft(model, tmp_path / "adapter", own_kind=own_kind)
        plain = build()
        attach(plain, dataclasses.replace(method, target_modules=["flat" if isinstance(plain, Images) else "last"]))
        export_peft(plain, tmp_path / "plain", own_kind=own_kind)  # negative control


def test_torchs_own_encoder_layer_reads_past_peft() -> None:
    """Control: in evaluation mode PEFT's adapters change nothing there, and ours do."""
    x = torch.randn(2, 3, 4)
    theirs = peft.get_peft_model(Encoder(), LoRA(target_modules=["linear1"])).eval()
    move(theirs)
    model = Encoder().eval()
    base = model(x).detach()
    attach(model, ours.LoRA(r=2, target_modules=["linear1"]))
    move(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), base, atol=1e-6, rtol=0)
        assert (model(x) - base).abs().max() > 1e-3


def test_adalora_that_was_pruned(tmp_path: Path) -> None:
    """Layers of different ranks, which PEFT names by masks."""
    config = AdaLoRA(
        init_r=4, target_r=1, total_step=4, tinit=1, tfinal=1, deltaT=1, target_modules=["q_proj", "v_proj"]
    )
    theirs = peft.get_peft_model(build_model("llama"), config)
    move(theirs)
    for step in range(4):
        answers(theirs)  # without a gradient; the importance comes from random ones
        generator = torch.Generator().manual_seed(step)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        theirs.base_model.update_and_allocate(step)
    expected = answers(theirs.eval())
    theirs.save_pretrained(tmp_path / "theirs")
    ranks = {len(one) for name, one in load_file(tmp_path / "theirs" / PEFT_WEIGHTS_NAME).items() if "lora_E" in name}
    assert len(ranks) > 1
    model = build_model("llama")
    load_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=0)
    alive = [adapter.lora_E != 0 for _, _, adapter in iter_adapters(model)]
    masks = theirs.peft_config["default"].rank_pattern
    assert [one.tolist() for one in alive] == [masks[f"{path}.lora_E"] for path, _, _ in iter_adapters(model)]
