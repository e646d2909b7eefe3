"""One or several settings of every method, and the models that it is defined on."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import lora_lightning.methods
from lora_lightning.adapters import Method
from lora_lightning.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRADrop,
    LoRAFA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TrainableTokens,
    VeRA,
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """Settings of a method, and what it declares not to do.

    Args:
        method: The settings, without dropout: the tests that need it add it.
        models: Where it is defined.
        is_exact: The first forward is the base's to the last bit.
        is_mergeable: It folds into dense weights.
        merges_quantized: It folds into a 4-bit base too, since it changes no weight.
        changes_start: The first forward is not the base's: soft prompts are there from the start.
        on_plain: It works on plain torch modules, which have no architecture.
        spread: How far parameters must move, as a standard deviation, to show above the rounding of bfloat16.
        without_gradient: Regular expression of parameters whose gradient is zero by nature.
        compiles_folded: It compiles in one graph only once it is folded: torch breaks the graph at an LSTM.
    """

    method: Method
    models: tuple[str, ...] = ("llama", "bert")
    is_exact: bool = False
    is_mergeable: bool = True
    merges_quantized: bool = False
    changes_start: bool = False
    on_plain: bool = True
    spread: float = 0.1
    without_gradient: str | None = None
    compiles_folded: bool = False


# One or several settings of every method.
EXAMPLES: dict[type[Method], dict[str, Example]] = {
    LoRA: {
        "lora": Example(method=LoRA(r=4, alpha=8, target_modules="all-linear"), is_exact=True),
        "lora-pissa": Example(
            method=LoRA(r=4, alpha=8, target_modules="all-linear", init="pissa"), models=("llama",), on_plain=False
        ),
        "lora-olora": Example(
            method=LoRA(r=4, alpha=8, target_modules="all-linear", init="olora"), models=("llama",), on_plain=False
        ),
    },
    AdaLoRA: {
        "adalora": Example(method=AdaLoRA(target_r=3, init_r=4, alpha=32, target_modules="all-linear"), is_exact=True)
    },
    IA3: {"ia3": Example(method=IA3(), is_exact=True, on_plain=False, spread=0.5)},
    BottleneckAdapter: {
        f"bottleneck-{style}": Example(
            method=BottleneckAdapter(style=style, width=8),
            models=("llama",) if style == "pfeiffer" else ("llama", "bert"),  # `houlsby` without its attention part
            is_exact=True,
            is_mergeable=False,
            on_plain=False,
            spread=0.2,
        )
        for style in ("houlsby", "pfeiffer", "parallel")
    },
    BitFit: {
        "bitfit": Example(
            method=BitFit(),
            models=("bert", "gpt2"),
            is_exact=True,
            merges_quantized=True,
            without_gradient=r".*\.self\.key\.delta",  # a shift of all keys cancels in the softmax
        )
    },
    LoRADrop: {
        "lora-drop": Example(
            method=LoRADrop(r=4, alpha=8, target_modules="all-linear"), models=("bert",), is_exact=True
        )
    },
    DoRA: {
        "dora": Example(method=DoRA(r=4, alpha=8, target_modules="all-linear")),
        "dora-input": Example(method=DoRA(r=4, alpha=8, target_modules="all-linear", magnitude_axis="input")),
    },
    LoRAFA: {
        "lora_fa": Example(method=LoRAFA(r=4, alpha=8, target_modules="all-linear"), models=("llama",), is_exact=True),
    },
    DeltaLoRA: {
        "delta_lora": Example(
            method=DeltaLoRA(r=4, alpha=8, delta_ratio=0.5, start_step=0, target_modules="all-linear"),
            models=("llama",),
            is_exact=True,
        ),
    },
    VeRA: {
        "vera": Example(method=VeRA(r=16, d_initial=0.5, target_modules="all-linear"), is_exact=True),
        "vera-saved": Example(
            method=VeRA(r=16, d_initial=0.5, target_modules="all-linear", save_projection=True),
            models=("llama",),
            is_exact=True,
            on_plain=False,
        ),
    },
}


EXAMPLES[TrainableTokens] = {
    "trainable-tokens": Example(
        method=TrainableTokens(token_indices=list(range(3, 40))),
        is_exact=True,
        on_plain=False,
        merges_quantized=True,  # embeddings stay dense
    )
}
SOFT = {"is_mergeable": False, "changes_start": True, "on_plain": False}
EXAMPLES |= {
    PromptTuning: {"prompt-tuning": Example(method=PromptTuning(num_virtual_tokens=4), **SOFT)},
    PTuning: {
        "p-tuning": Example(method=PTuning(num_virtual_tokens=4), **SOFT),
        "p-tuning-lstm": Example(
            method=PTuning(num_virtual_tokens=4, encoder="lstm"), models=("bert",), compiles_folded=True, **SOFT
        ),
    },
    PrefixTuning: {"prefix-tuning": Example(method=PrefixTuning(num_virtual_tokens=4), **SOFT)},
    PTuningV2: {"p-tuning-v2": Example(method=PTuningV2(num_virtual_tokens=4), **SOFT)},
}
CASES = {
    f"{name}-{architecture}": (example, architecture)
    for examples in EXAMPLES.values()
    for name, example in examples.items()
    for architecture in example.models
}
ON_PLAIN = {
    name: example.method for examples in EXAMPLES.values() for name, example in examples.items() if example.on_plain
}


def concrete_methods() -> set[type[Method]]:
    """Return every concrete method of the package."""
    for module in pkgutil.walk_packages(lora_lightning.methods.__path__, "lora_lightning.methods."):
        importlib.import_module(module.name)

    def below(cls: type[Method]) -> Iterator[type[Method]]:
        for subclass in cls.__subclasses__():
            yield subclass
            yield from below(subclass)

    concrete = {cls for cls in below(Method) if not inspect.isabstract(cls)}
    public = {cls for cls in concrete if not cls.__name__.startswith("_")}  # the ends of `compare` are no methods
    return {cls for cls in public if cls.__module__.startswith("lora_lightning.")}
