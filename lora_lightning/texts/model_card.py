"""The model card (`README.md`) of an exported folder: front matter that the Hub reads, and how to load the folder."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CARD_NAME = "README.md"
FOLDER = "path/or/owner/name"
"""Stands in the examples for the folder, or for the Hub repository with its files."""

_LIBRARY = "lora_lightning"
_SEAL = re.compile(r"<!-- lora_lightning: ([0-9a-f]{16}) -->\n")
_SPLITS = {"val": "validation", "test": "test"}
_NUM_LABELS_SHOWN = 20
# End of a model's class name -> the class of transformers that loads it, and what the Hub calls its task.
_HEADS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card tells.

    Args:
        adapter_format: `peft`, `lora_lightning` or `merged`, as in the manifest.
        is_for_peft: Whether PEFT reads the folder.
        base: Hub name or `pkg://` path of the base; None where others do not know it by a name.
        model_class: Class of the model, such as `LlamaForCausalLM`.
        auto_class: The class of transformers that loads it, or None.
        pipeline_tag: What the Hub calls its task, or None.
        methods: Each method as `{"class_path": ..., "init_args": {...}}`.
        num_parameters: Number of trained parameters.
        label_names: Class names in the order of their ids, or None.
        metrics: Last value of each metric.
        epoch: Epochs finished.
        step: Optimizer steps taken.
        versions: Versions of the libraries.
        has_tokenizer: Whether the folder holds a tokenizer.
    """

    adapter_format: str
    is_for_peft: bool
    base: str | None
    model_class: str
    auto_class: str | None
    pipeline_tag: str | None
    methods: Sequence[Mapping[str, Any]]
    num_parameters: int
    label_names: Sequence[str] | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    has_tokenizer: bool = False

    @property
    def hub_base(self) -> str | None:
        """The base, where it has a name on the Hub."""
        return None if self.base is None or "://" in self.base else self.base

    @property
    def library(self) -> str:
        """The library that loads the folder, as the Hub names it."""
        if self.adapter_format == "merged":
            return _LIBRARY if self.auto_class is None else "transformers"
        return "peft" if self.is_for_peft else _LIBRARY

    @property
    def method_names(self) -> list[str]:
        """Names of the methods, such as `LoRA`."""
        return [str(method["class_path"]).rpartition(".")[2] for method in self.methods]


def head_of(model: Any) -> tuple[str | None, str | None]:  # noqa: ANN401 - any module
    """Return the class of transformers that loads a model, and what the Hub calls its task; None where unknown."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or config is None:
        return None, None
    found = next((head for end, head in _HEADS.items() if name.endswith(end)), None)
    if found is not None:
        return found
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        return "AutoModel", None
    if getattr(config, "is_encoder_decoder", False):
        return "AutoModelForSeq2SeqLM", None  # whether it translates or summarizes is not known
    return "AutoModelForCausalLM", "text-generation"


def model_card(facts: CardFacts) -> bytes:
    """Return the card, sealed with a digest by which `is_untouched` knows it again."""
    text = f"---\n{_front_matter(facts)}\n---\n\n{_body(facts)}\n"
    return f"{text}<!-- {_LIBRARY}: {_digest(text)} -->\n".encode()


def is_untouched(path: Path) -> bool:
    """Return whether a file is a card that this library wrote and that was not edited."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    seals = list(_SEAL.finditer(text))
    return bool(seals) and seals[-1].end() == len(text) and seals[-1][1] == _digest(text[: seals[-1].start()])


def keep_edited(old: Path, new: Path) -> None:
    """Take the card of a folder that is about to be replaced along, where a person wrote or edited it.

    Args:
        old: The folder; it may be missing.
        new: The folder that takes its place.
    """
    card = old / CARD_NAME
    if card.is_file() and not is_untouched(card):
        (new / CARD_NAME).write_bytes(card.read_bytes())
        warnings.warn(f"{card} was edited and stays as it is; it does not describe the new weights.", stacklevel=3)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    relation = "finetune" if facts.adapter_format == "merged" else "adapter"
    tags = [_LIBRARY, *(name.lower() for name in facts.method_names)]
    if facts.hub_base is not None:
        tags.append(f"base_model:{relation}:{facts.hub_base}")
    results = _results(facts)
    data = ModelCardData(
        base_model=facts.hub_base,
        base_model_relation=None if facts.hub_base is None else relation,
        library_name=facts.library,
        pipeline_tag=facts.pipeline_tag,
        tags=list(dict.fromkeys(tags)),
        model_name=_model_name(facts) if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _model_name(facts: CardFacts) -> str:
    base = facts.hub_base.rpartition("/")[2] if facts.hub_base is not None else facts.model_class
    return "-".join([base, *(name.lower() for name in facts.method_names)])


def _results(facts: CardFacts) -> list[Any]:
    """Return the metrics of validation and test as the Hub's model index has them."""
    from huggingface_hub import EvalResult

    found: list[Any] = []
    for name, value in _measured(facts):
        split, *middle, metric = name.split("/")
        data_name = "/".join(["the data of the training", *middle])
        found.append(
            EvalResult(
                task_type=facts.pipeline_tag or "other",
                dataset_type="unknown",  # the Hub wants one, and where the rows came from may be private
                dataset_name=data_name,
                dataset_split=_SPLITS[split],
                metric_type=metric,
                metric_name=name,
                metric_value=value,
            )
        )
    return found


def _measured(facts: CardFacts) -> list[tuple[str, float]]:
    """Return the finite metrics of validation and test by their names, such as `val/loss`."""
    known = sorted(facts.metrics.items())
    return [(name, value) for name, value in known if value is not None and name.partition("/")[0] in _SPLITS]


def _body(facts: CardFacts) -> str:
    names = " + ".join(facts.method_names)
    base = _link(facts.base) or f"a `{facts.model_class}` of the trainer's own"
    what = "A model with an adapter merged in" if facts.adapter_format == "merged" else "An adapter"
    steps = _count(facts.step, "optimizer step")
    parts = [
        f"# {_model_name(facts)}",
        f"{what}: {names} on {base}, trained with `{_LIBRARY}`.",
        "## Training",
        f"{facts.num_parameters:,} trained parameters, {steps}, epoch {facts.epoch}.",
        *(_labels(facts)),
        *(_settings(method) for method in facts.methods),
        *(_metrics_table(facts)),
        "## Use",
        *_examples(facts),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items())),
    ]
    return "\n\n".join(part for part in parts if part)


def _link(base: str | None) -> str | None:
    if base is None:
        return None
    return f"`{base}`" if "://" in base else f"[{base}](https://huggingface.co/{base})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _labels(facts: CardFacts) -> list[str]:
    if not facts.label_names:
        return []
    shown = ", ".join(f"`{name}`" for name in facts.label_names[:_NUM_LABELS_SHOWN])
    more = len(facts.label_names) - _NUM_LABELS_SHOWN
    return [f"Labels: {shown}{f' and {more} more' if more > 0 else ''}."]


def _settings(method: Mapping[str, Any]) -> str:
    """Return the settings of a method as a table; what may be a path of the trainer's machine is left out."""
    known = {
        name: value for name, value in method["init_args"].items() if value is not None and not _may_be_path(value)
    }
    rows = [f"| `{name}` | `{_cell(value)}` |" for name, value in known.items()]
    name = str(method["class_path"]).rpartition(".")[2]
    return "\n".join([f"| {name} | |", "|---|---|", *rows])


def _cell(value: Any) -> str:  # noqa: ANN401 - plain JSON types
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|").replace("`", "'")


def _may_be_path(value: Any) -> bool:  # noqa: ANN401 - plain JSON types
    if isinstance(value, Mapping):
        return any(map(_may_be_path, value.values()))
    if isinstance(value, list):
        return any(map(_may_be_path, value))
    return isinstance(value, str) and ("/" in value or "\\" in value) and not value.isspace() and _exists(value)


def _exists(text: str) -> bool:
    try:
        return Path(text).is_absolute() or text.startswith("~") or Path(text).exists()
    except OSError:  # longer than a name can be
        return False


def _metrics_table(facts: CardFacts) -> list[str]:
    measured = _measured(facts)
    if not measured:
        return []
    rows = [f"| {name.replace('|', chr(92) + '|')} | {value:.6g} |" for name, value in measured]
    return ["\n".join(["| metric | last value |", "|---|---|", *rows])]


def _examples(facts: CardFacts) -> list[str]:
    if facts.adapter_format == "merged":
        return _merged_examples(facts)
    parts: list[str] = []
    if facts.is_for_peft and facts.auto_class is not None:
        labels = f", num_labels={len(facts.label_names)}" if facts.label_names else ""
        parts += [
            "With PEFT:",
            _code(
                f"from peft import PeftModel\nfrom transformers import {facts.auto_class}{_and_tokenizer(facts)}\n\n"
                f"base = {facts.auto_class}.from_pretrained({_base_in_code(facts)}{labels})\n"
                f'model = PeftModel.from_pretrained(base, "{FOLDER}")' + _tokenizer_line(facts)
            ),
        ]
    parts += [f"With `{_LIBRARY}`:", _code(_own_example(facts))]
    if facts.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        parts.append(_code(f'lora-lightning generate --adapter_dir {FOLDER} --prompt "Hello"', "sh"))
    return parts


def _own_example(facts: CardFacts) -> str:
    task = {
        "AutoModelForSequenceClassification": "SequenceClassification",
        "AutoModelForTokenClassification": "TokenClassification",
        "AutoModelForMultipleChoice": "MultipleChoice",
        "AutoModelForCausalLM": "CausalLM",
        "AutoModelForSeq2SeqLM": "Seq2SeqLM",
    }.get(facts.auto_class or "")
    if task is not None:
        labels = f", label_names={list(facts.label_names)!r}" if facts.label_names else ""
        return (
            f"from {_LIBRARY} import {task}\n\n"
            f'task = {task}({_base_in_code(facts)}, adapter="{FOLDER}"{labels})\n'
            "task.configure_model()\nmodel = task.model"
        )
    if facts.is_for_peft:
        return f'from {_LIBRARY} import load_peft\n\nload_peft(model, "{FOLDER}")  # `model` is the base'
    names = ", ".join(dict.fromkeys(facts.method_names))
    return (
        f"from {_LIBRARY} import attach, load_adapter\n\n"
        f"attach(model, ...)  # {names} with the settings above; `model` is the base\n"
        f'load_adapter(model, "{FOLDER}")'
    )


def _merged_examples(facts: CardFacts) -> list[str]:
    if facts.auto_class is None:
        return [
            "The weights are a state dict for the model's own class:",
            _code(
                "from safetensors.torch import load_file\n\n"
                f'model.load_state_dict(load_file("{FOLDER}/model.safetensors"))'
            ),
        ]
    parts = [
        "With transformers:",
        _code(
            f"from transformers import {facts.auto_class}{_and_tokenizer(facts)}\n\n"
            f'model = {facts.auto_class}.from_pretrained("{FOLDER}")' + _tokenizer_line(facts)
        ),
    ]
    if facts.pipeline_tag == "text-generation":
        parts += [
            f"With `{_LIBRARY}`:",
            _code(f'lora-lightning generate --backbone {FOLDER} --prompt "Hello"', "sh"),
        ]
    return parts


def _base_in_code(facts: CardFacts) -> str:
    return f'"{facts.base or "path/of/the/base"}"'


def _and_tokenizer(facts: CardFacts) -> str:
    return ", AutoTokenizer" if facts.has_tokenizer else ""


def _tokenizer_line(facts: CardFacts) -> str:
    return f'\ntokenizer = AutoTokenizer.from_pretrained("{FOLDER}")' if facts.has_tokenizer else ""


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"
