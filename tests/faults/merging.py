"""Faults of merging, exporting, and what else is done with a finished run."""

from pathlib import Path

from lora_lightning import BitFit, CausalLM, LoRA, PromptTuning, Quantization, SequenceClassification
from lora_lightning.backbones.load import load_backbone
from tests.checkpoint.runs import save_checkpoint, save_wide_base
from tests.faults.bench import CKPT, MERGE, Fault, checkpoint, leave_alone, other_base, other_tokenizer
from tests.faults.loading import new_weights


class PackedTask(CausalLM):
    """Loads its base in 4 bits by itself, so that there is no dense one to merge into."""

    def configure_backbone(self):
        return load_backbone(self.backbone, self.auto_class, quantization=Quantization()).model


def saved(task_class, method, arguments=MERGE, **settings):
    """Put the checkpoint of another task or method where the run's was."""

    def provoke():
        if issubclass(task_class, CausalLM):
            save_wide_base("llama", Path("wide"))
        leave_alone()
        save_checkpoint(task_class(method=method, **settings), Path(CKPT))
        return arguments

    return provoke


CLASSIFIER = {"backbone": "base", "label_names": ["no", "yes"]}


def tiny(content):
    for name, tensor in content["state_dict"].items():
        if "lora_B" in name:
            tensor.fill_(1e-7)


def taken():
    Path("taken").mkdir()
    Path("taken/file").write_text("")
    return [*MERGE[:-1], "taken"]


FAULTS = [
    Fault("missing setting", r"^`output_dir` is missing; give a string", ["merge", "--ckpt_path", CKPT]),
    Fault(
        "merge of a missing checkpoint",
        r"^There is no checkpoint gone\.ckpt",
        ["merge", "--ckpt_path", "gone.ckpt", "--output_dir", "out"],
    ),
    Fault("merge over a folder", r"^taken exists already; name a folder that does not, or remove it", taken),
    Fault(
        "merge of a prompt method",
        r"^run/last\.ckpt was not merged: A soft prompt is part of the input and cannot be merged into weights",
        saved(SequenceClassification, PromptTuning(num_virtual_tokens=2), **CLASSIFIER),
    ),
    Fault(
        "merge into 4 bits",
        r"^run/last\.ckpt stands on a base that its task loads quantized by itself, so there is no dense one to merge",
        saved(PackedTask, LoRA(r=2, target_modules=["q_proj"]), backbone="wide"),
    ),
    Fault(
        "merge into another base", r"^The checkpoint was trained on another base model", other_base(new_weights, MERGE)
    ),
    Fault(
        "merge with another tokenizer",
        r"^run/last\.ckpt was trained with another tokenizer",
        other_tokenizer(MERGE, alone=True),
    ),
    Fault(
        "dequantize what is dense",
        r"stands on a base that is not quantized; leave dequantize out",
        [*MERGE, "--dequantize"],
    ),
    Fault(
        "update lost in the cast",
        r"^Merging into bfloat16 would lose the update: .*Nothing was written",
        checkpoint(tiny, [*MERGE, "--dtype", "bfloat16"]),
    ),
    Fault(
        "unknown precision of a merge",
        r"^dtype must be one of float32, bfloat16, float16, got 'int3'",
        [*MERGE, "--dtype", "int3"],
    ),
    Fault(
        "unknown size of shards",
        r"^max_shard_size must be a size such as 5GB or 500MB, got '5XB'",
        [*MERGE, "--max_shard_size", "5XB"],
    ),
    Fault(
        "export's setting for merges",
        r"^--force is for --to merged; an adapter is written as it was trained",
        ["export", *MERGE[1:], "--force"],
    ),
    Fault(
        "export of what PEFT has no words for",
        r"^This adapter cannot be written in PEFT's format: only biases or full copies of modules were trained",
        saved(SequenceClassification, BitFit(), ["export", *MERGE[1:]], **CLASSIFIER),
    ),
    Fault(
        "generate with a classifier",
        r"whose model does not write text; generate and chat need a checkpoint of CausalLM",
        ["generate", "--ckpt_path", CKPT, "--prompt", "a"],
    ),
    Fault("generate without a model", r"^No model is named: give --ckpt_path", ["generate", "--prompt", "a"]),
    Fault(
        "generate at a negative temperature",
        r"temperature is -1\.0: expected at least 0",
        ["generate", "--prompt", "a", "--temperature=-1", "--ckpt_path", CKPT],
    ),
    Fault(
        "plan for a size that is none",
        r"^gpu: 'big' is neither an amount of memory, such as 24GB, nor a GPU known here",
        ["plan", "--config", "good.yaml", "--gpu", "big"],
    ),
]
