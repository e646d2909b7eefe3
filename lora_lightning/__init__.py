"""Parameter-efficient fine-tuning as plain PyTorch Lightning.

Names are imported when they are first used, so `import lora_lightning` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.adapters import (
        adapter_state_dict,
        bind,
        detach,
        disabled,
        load_adapter_state_dict,
        refresh,
    )
    from lora_lightning.backbones.attach import attach, merge
    from lora_lightning.backbones.quantization import Quantization
    from lora_lightning.callbacks import (
        AdapterCheckpoint,
        AdapterFinetuning,
        AdapterSummary,
        Guards,
        IdleParameterGuard,
        MergeAtEnd,
        MetricCurve,
        NonFiniteGuard,
        OutOfMemoryGuard,
        RankWatch,
        SampleGenerations,
        SignalGuard,
        Throughput,
    )
    from lora_lightning.checkpoint import export_peft, load_adapter, load_peft
    from lora_lightning.data import (
        InstructionData,
        MultipleChoiceData,
        Seq2SeqData,
        TextClassificationData,
        TokenClassificationData,
    )
    from lora_lightning.finetuning import finetune, load_finetuned, merge_finetuned
    from lora_lightning.merging import merge_checkpoint
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
    from lora_lightning.methods.recompute import recompute_activations
    from lora_lightning.optim import Optim, param_groups
    from lora_lightning.peft_format.preflight import preflight
    from lora_lightning.strategies import FSDP2Strategy
    from lora_lightning.tasks import (
        AdapterTask,
        CausalLM,
        MultipleChoice,
        PerTokenTask,
        Seq2SeqLM,
        SequenceClassification,
        StepOutput,
        TokenClassification,
        TokenSums,
    )

__version__ = "0.1.0"

_HOME = {
    "AdaLoRA": "methods",
    "AdapterCheckpoint": "callbacks",
    "AdapterFinetuning": "callbacks",
    "AdapterSummary": "callbacks",
    "AdapterTask": "tasks",
    "BitFit": "methods",
    "BottleneckAdapter": "methods",
    "CausalLM": "tasks",
    "DeltaLoRA": "methods",
    "DoRA": "methods",
    "Guards": "callbacks",
    "FSDP2Strategy": "strategies",
    "IA3": "methods",
    "IdleParameterGuard": "callbacks",
    "InstructionData": "data",
    "LoRA": "methods",
    "LoRADrop": "methods",
    "LoRAFA": "methods",
    "MergeAtEnd": "callbacks",
    "ExactResume": "callbacks",
    "MetricCurve": "callbacks",
    "MultipleChoice": "tasks",
    "MultipleChoiceData": "data",
    "NonFiniteGuard": "callbacks",
    "Optim": "optim",
    "OutOfMemoryGuard": "callbacks",
    "PTuning": "methods",
    "PTuningV2": "methods",
    "PerTokenTask": "tasks",
    "PrefixTuning": "methods",
    "PromptTuning": "methods",
    "Quantization": "backbones.quantization",
    "RankWatch": "callbacks",
    "SampleGenerations": "callbacks",
    "Seq2SeqData": "data",
    "Seq2SeqLM": "tasks",
    "SequenceClassification": "tasks",
    "SignalGuard": "callbacks",
    "StepOutput": "tasks",
    "TextClassificationData": "data",
    "Throughput": "callbacks",
    "TokenClassification": "tasks",
    "TokenClassificationData": "data",
    "TokenSums": "tasks",
    "TrainableTokens": "methods",
    "VeRA": "methods",
    "adapter_state_dict": "adapters",
    "attach": "backbones.attach",
    "bind": "adapters",
    "detach": "adapters",
    "disabled": "adapters",
    "export_peft": "checkpoint",
    "finetune": "finetuning",
    "load_adapter": "checkpoint",
    "load_adapter_state_dict": "adapters",
    "load_finetuned": "finetuning",
    "merge_finetuned": "finetuning",
    "refresh": "adapters",
    "load_peft": "checkpoint",
    "merge": "backbones.attach",
    "merge_checkpoint": "merging",
    "param_groups": "optim",
    "preflight": "peft_format.preflight",
    "recompute_activations": "methods.recompute",
}

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdapterCheckpoint",
    "AdapterFinetuning",
    "AdapterSummary",
    "AdapterTask",
    "BitFit",
    "BottleneckAdapter",
    "CausalLM",
    "DeltaLoRA",
    "DoRA",
    "ExactResume",
    "FSDP2Strategy",
    "Guards",
    "IdleParameterGuard",
    "InstructionData",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "MergeAtEnd",
    "MetricCurve",
    "MultipleChoice",
    "MultipleChoiceData",
    "NonFiniteGuard",
    "Optim",
    "OutOfMemoryGuard",
    "PTuning",
    "PTuningV2",
    "PerTokenTask",
    "PrefixTuning",
    "PromptTuning",
    "Quantization",
    "RankWatch",
    "SampleGenerations",
    "Seq2SeqData",
    "Seq2SeqLM",
    "SequenceClassification",
    "SignalGuard",
    "StepOutput",
    "TextClassificationData",
    "Throughput",
    "TokenClassification",
    "TokenClassificationData",
    "TokenSums",
    "TrainableTokens",
    "VeRA",
    "__version__",
    "adapter_state_dict",
    "attach",
    "bind",
    "detach",
    "disabled",
    "export_peft",
    "finetune",
    "load_adapter",
    "load_adapter_state_dict",
    "load_finetuned",
    "load_peft",
    "merge",
    "merge_checkpoint",
    "merge_finetuned",
    "param_groups",
    "preflight",
    "recompute_activations",
    "refresh",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module 'lora_lightning' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lora_lightning.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
