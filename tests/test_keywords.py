"""Settings that classes forward to their bases: what is taken, shown, refused and kept."""

import inspect
import pickle
from dataclasses import dataclass
from typing import Any

import jsonargparse._parameter_resolvers as resolvers
import pytest

import lora_lightning as ll
from lora_lightning import callbacks, data, methods, tasks
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.checkpoint.task_class import constructor_arguments
from lora_lightning.errors import ConfigError
from lora_lightning.keywords import UnknownSetting, parameters_taken
from lora_lightning.optim import Optim


def settings_classes() -> list[type]:
    """Every public class that a config may name, and the two that stand inside tasks."""
    found = [getattr(room, name) for room in (tasks, data, methods, callbacks) for name in room.__all__]
    classes = [one for one in found if inspect.isclass(one) and not issubclass(one, tuple)]
    return [*classes, Optim, Quantization]


def documented(cls: type) -> dict[str, str | None]:
    """Return what `--help` says about each setting."""
    method = None if hasattr(cls, "__dataclass_fields__") else "__init__"
    return {one.name: one.doc for one in resolvers.get_signature_parameters(cls, method)}


@pytest.mark.parametrize("cls", settings_classes(), ids=lambda cls: cls.__name__)
def test_the_help_explains_every_setting_in_its_own_words(cls):
    for name, doc in documented(cls).items():
        assert doc, f"{cls.__name__}.{name} has no help"
        assert not doc.startswith("See "), f"{cls.__name__}.{name} refers to another page"


def test_a_setting_without_a_docstring_is_found_by_the_check_above():
    @dataclass(frozen=True, kw_only=True)
    class Undocumented(methods.LoRA):
        """A method with a setting that nothing explains."""

        bare: int = 3

    assert documented(Undocumented)["bare"] is None
    assert documented(Undocumented)["r"]


@pytest.mark.parametrize(
    "cls", [ll.SequenceClassification, ll.CausalLM, ll.AdapterCheckpoint], ids=lambda c: c.__name__
)
def test_the_help_and_the_signature_list_the_same_settings(cls):
    assert set(documented(cls)) == set(inspect.signature(cls).parameters)


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (
            lambda: ll.SequenceClassification(bacbone="x"),
            "SequenceClassification has no setting 'bacbone'; .*`backbone`",
        ),
        (lambda: ll.SequenceClassification(problm="x"), "`problem`"),
        (lambda: ll.TokenClassification(label_name=["a"]), "`label_names`"),
        (lambda: ll.CausalLM(loss_chunk=3), "`loss_chunk_size`"),
        (lambda: ll.TextClassificationData("x", batchsize=3), "TextClassificationData has no setting .*`batch_size`"),
        (lambda: ll.AdapterCheckpoint(monitr="x"), "AdapterCheckpoint has no setting 'monitr'; .*`monitor`"),
        (lambda: ll.LoRA(droput=0.1), "LoRA has no setting 'droput'; .*`dropout`"),
    ],
)
def test_a_misspelt_keyword_is_refused_with_the_nearest_right_word(build, wanted):
    with pytest.raises(ConfigError, match=wanted):
        build()


@pytest.mark.parametrize(
    "cls",
    [cls for cls in settings_classes() if documented(cls)],
    ids=lambda c: c.__name__,
)
def test_every_class_names_the_nearest_right_word(cls):
    for name in inspect.signature(cls).parameters:
        with pytest.raises(ConfigError, match=rf"{cls.__name__} has no setting '{name}_'; did you mean `{name}`\?"):
            cls(**{f"{name}_": None})


def test_an_unknown_keyword_is_a_type_error_as_python_raises_it():
    assert issubclass(UnknownSetting, TypeError)
    with pytest.raises(TypeError, match=r"it takes .*backbone, .*method"):
        ll.CausalLM(zzz=1)


def test_right_keywords_of_every_base_are_taken():
    task = ll.SequenceClassification(
        "x", methods.LoRA(r=2), class_weights={"a": 2.0}, label_names=["a", "b"], dtype="float32"
    )
    assert task.hparams["class_weights"] == {"a": 2.0}
    assert task.hparams["dtype"] == task.backbone_dtype == "float32"
    assert task.hparams["method"]["init_args"]["r"] == 2


class Taking(ll.AdapterTask):
    """A user's task that takes a setting out of its keywords."""

    def __init__(self, **kwargs: Any) -> None:
        self.own = kwargs.pop("own", None)
        super().__init__(**kwargs)


def test_keywords_that_a_users_class_takes_for_itself_are_its_own():
    assert Taking(own=3).own == 3
    assert parameters_taken(Taking) == ({}, True)
    with pytest.raises(TypeError, match="bacbone"):  # Python itself refuses it
        Taking(bacbone="x")


def test_a_checkpoint_of_a_class_that_forwards_gives_back_every_setting():
    settings = {"backbone": "x", "dtype": "float32", "problem": "regression", "of_another_version": 1}
    found = constructor_arguments(ll.SequenceClassification, settings, given=["backbone"])
    assert found == {"backbone": "x", "dtype": "float32", "problem": "regression"}
    assert constructor_arguments(Taking, settings, given=["backbone"]) == {"backbone": "x"}


def test_a_task_and_a_data_module_are_pickled():
    task = pickle.loads(pickle.dumps(ll.SequenceClassification("x", dtype="float32")))
    assert task.backbone_dtype == "float32"
    module = pickle.loads(pickle.dumps(ll.TextClassificationData("x.csv", batch_size=3)))
    assert module.batch_size == 3
    assert module.hparams["batch_size"] == 3
