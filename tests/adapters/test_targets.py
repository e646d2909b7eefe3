import pytest
import torch
from torch import nn

from lora_lightning.adapters import PlainView
from lora_lightning.adapters.targets import by_pattern, check_patterns, find_modules, select_hosts
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import DoRA, LoRA
from tests.adapters.toys import Model


class View(PlainView):
    """A view that knows usual targets and a head."""

    def usual_targets(self):
        return ["value"]

    def head_paths(self):
        return ["head.out"]


def chosen(view=None, **settings) -> list[str]:
    return [path for path, _ in select_hosts(view or PlainView(Model()), LoRA(r=2, **settings))]


LINEAR = ["layer.0.query", "layer.0.value", "layer.1.query", "layer.1.value", "head.dense", "head.out"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["query"]}, ["layer.0.query", "layer.1.query"]),
        ({"target_modules": ("value", "query")}, LINEAR[:4]),
        ({"target_modules": ["1.query", "head.out"]}, ["layer.1.query", "head.out"]),
        ({"target_modules": ["embed", "layer.0.query"]}, ["embed", "layer.0.query"]),
        ({"target_modules": r".*\.(query|value)"}, LINEAR[:4]),
        ({"target_modules": r"layer\.1\..*y"}, ["layer.1.query"]),
        ({"target_modules": "embed"}, ["embed"]),
        ({"target_modules": "all-linear"}, LINEAR),
        ({}, LINEAR),
        ({"exclude_modules": ["head"]}, LINEAR[:4]),
        ({"exclude_modules": ["query", "out"]}, ["layer.0.value", "layer.1.value", "head.dense"]),
        ({"exclude_modules": r"layer\..*"}, ["head.dense", "head.out"]),
        ({"exclude_modules": []}, LINEAR),
        ({"target_modules": ["query"], "exclude_modules": ["layer.0"]}, ["layer.1.query"]),
        ({"target_modules": ["query"], "layers_to_transform": 0}, ["layer.0.query"]),
        ({"layers_to_transform": [1]}, ["layer.1.query", "layer.1.value"]),
        ({"layers_to_transform": [1, 0]}, LINEAR[:4]),
        ({"modules_to_save": ["head"]}, LINEAR[:4]),
        ({"modules_to_save": ["out"]}, LINEAR[:5]),
    ],
)
def test_selection(settings, expected):
    assert chosen(**settings) == expected


def test_a_suffix_leaves_out_what_is_trained_as_a_copy_and_says_so(recwarn):
    with pytest.warns(UserWarning, match=r"leaves out 1 modules that modules_to_save trains.*'layer\.0\.query'"):
        assert chosen(target_modules=["query"], modules_to_save=["layer.0"]) == ["layer.1.query"]
    recwarn.clear()
    # Nothing is left out of what was asked for: the layers are named, or excluded.
    assert chosen(target_modules=["layer.1.query"], modules_to_save=["layer.0"]) == ["layer.1.query"]
    excluding = {"exclude_modules": ["layer.0"], "modules_to_save": ["layer.0"]}
    assert chosen(target_modules=["query"], **excluding) == ["layer.1.query"]
    assert not recwarn.list
    with pytest.raises(TargetError, match="both a target and in modules_to_save"):
        chosen(target_modules=["layer.0.query"], modules_to_save=["layer.0"])


def test_the_view_knows_usual_targets_and_the_head():
    view = View(Model())
    assert chosen(view) == ["layer.0.value", "layer.1.value"]
    assert chosen(view, target_modules="all-linear") == LINEAR[:5]
    assert chosen(view, target_modules=["out"]) == ["head.out"]  # named, it is taken


def test_excluding_what_could_not_be_adapted():
    assert chosen(target_modules=["query", "norm"], exclude_modules=["norm"]) == ["layer.0.query", "layer.1.query"]
    assert chosen(target_modules=["query", "out"], exclude_modules=["head"], modules_to_save=["head"]) == [
        "layer.0.query",
        "layer.1.query",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["qwery"]}, r"target_modules: no module is called 'qwery'\. Nearest names: query\."),
        ({"target_modules": ["query", "valeu"]}, r"no module is called 'valeu'\. Nearest names: value\."),
        ({"target_modules": ["0.qury"]}, r"no module is called '0.qury'\. Nearest names: 0\.query, 1\.query, "),
        (
            {"target_modules": ["zzz"]},
            r"Module names of this model: embed, layer, query, value, norm, head, dense, out\.",
        ),
        ({"target_modules": ["quer"]}, "no module is called 'quer'"),  # half a name is no suffix
        (
            {"target_modules": "query"},
            r"regular expression 'query' matches no whole module path\. Nearest names: query",
        ),
        (
            {"target_modules": ["norm"]},
            r"'layer.0.norm' is a LayerNorm, which cannot be adapted; adapters hang on linear",
        ),
        ({"target_modules": ["head"]}, r"'head' is a Sequential, which cannot be adapted; it holds dense, out\."),
        ({"target_modules": ["layer"]}, r"it holds 0\.query, 0\.value, 1\.query, 1\.value\."),
        ({"exclude_modules": ["quary"]}, r"exclude_modules: no module is called 'quary'\. Nearest names: query"),
        (
            {"target_modules": ["query"], "exclude_modules": ["layer"]},
            r"leaves out everything that target_modules matched",
        ),
        ({"layers_to_transform": [2]}, r"layers_to_transform=\[2\]: the matched modules lie in layers 0, 1;"),
        ({"layers_to_transform": []}, r"choose among these"),
        ({"target_modules": ["out"], "layers_to_transform": 0}, r"\(none has a layer number\)"),
        (
            {"target_modules": ["out"], "modules_to_save": ["head"]},
            r"'head.out' is both a target and in modules_to_save",
        ),
    ],
)
def test_target_errors(settings, message):
    with pytest.raises(TargetError, match=message):
        chosen(**settings)


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_a_malformed_regular_expression(setting):
    with pytest.raises(ConfigError, match=rf"{setting}: '\(' is no valid regular expression"):
        chosen(**{setting: "("})


def test_long_name_lists_are_cut():
    model = nn.Module()
    for index in range(20):
        model.add_module(f"part{chr(97 + index)}", nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"parta, .*partl, …\."):
        chosen(PlainView(model), target_modules=["zzz"])


def test_all_linear_without_any():
    with pytest.raises(TargetError, match="all-linear found no linear layer outside the output head"):
        chosen(PlainView(nn.Sequential(nn.ReLU())))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def weight_norm(module: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(module)


def pruned(module: nn.Module) -> nn.Module:
    return torch.nn.utils.prune.l1_unstructured(module, "weight", 2)


@pytest.mark.parametrize(
    "build",
    [lambda: OwnForward(4, 4), lambda: weight_norm(nn.Linear(4, 4, bias=False)), lambda: pruned(nn.Linear(4, 4))],
)
def test_linear_layers_of_another_kind_are_left_out_loudly(build):
    """Their output is not x W^T + b with a W that can be written: an adapter or a merge would go wrong silently."""
    view = PlainView(nn.Sequential(nn.Linear(4, 4), build()))
    with pytest.warns(UserWarning, match=r"all-linear leaves out layers .*: 1 \("):
        assert chosen(view) == ["0"]
    with pytest.raises(TargetError, match=r"'1' is a \w+, which cannot be adapted"):
        chosen(view, target_modules=["1"])


class SubclassWithoutForward(nn.Linear):
    pass


def test_a_subclass_with_the_same_forward_is_taken():
    assert chosen(PlainView(nn.Sequential(SubclassWithoutForward(4, 4)))) == ["0"]


def test_by_pattern():
    patterns = {"query": 1, r"layer\.1\..*": 2, "al.*": 3}
    assert [by_pattern(path, patterns, 0) for path in LINEAR] == [1, 0, 1, 2, 0, 0]
    assert by_pattern("layer.0.query", None, 7) == 7
    assert by_pattern("x.subquery", {"query": 1}, 0) == 0


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_patterns_must_fit(setting):
    with pytest.raises(TargetError, match=rf"{setting}: 'valeu' fits no adapted module\. Nearest names: value"):
        list(LoRA(r=2, **{setting: {"query": 1, "valeu": 1}}).adapters(PlainView(Model())))
    with pytest.raises(ConfigError, match=rf"{setting}: '\[' is no valid regular expression"):
        list(LoRA(r=2, **{setting: {"[": 1}}).adapters(PlainView(Model())))
    check_patterns(setting, None, LINEAR)


def test_find_modules():
    assert find_modules(Model(), ["head", "norm"], "modules_to_save") == ["layer.0.norm", "layer.1.norm", "head"]
    with pytest.raises(TargetError, match="modules_to_save: no module is called 'haed'"):
        find_modules(Model(), ["haed"], "modules_to_save")


# Settings, checked when the method is built

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"r": bad}, r"r must be an integer of at least 1, got") for bad in (0, -1, True, "8", "8x", 2.0, None)],
        *[({"dropout": bad}, "dropout must be at least 0 and below 1") for bad in (1.5, 1, -0.1, True, "0.1", NAN)],
        *[({"alpha": bad}, "alpha must be a finite number above 0") for bad in (0, -1, NAN, INF, True, "16")],
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be an integer of at least 1, got 0"),
        ({"alpha_pattern": {"query": -1}}, r"alpha_pattern\['query'\] must be a finite number above 0, got -1"),
        ({"scaling": "linear"}, "scaling must be one of standard, rslora, alpha, got 'linear'"),
        ({"init": "zeros"}, "init must be one of kaiming, gaussian, .*, got 'zeros'"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"modules_to_save": "head"}, r"modules_to_save must be a list of names, got a string; write \['head'\]"),
        ({"lora_alpha": 16}, r"has no setting 'lora_alpha'; use alpha\."),
        ({"lora_dropout": 0.1}, r"has no setting 'lora_dropout'; use dropout\."),
        ({"task_type": "SEQ_CLS"}, r"has no setting 'task_type'; use nothing: the task's class says it\."),
        ({"ranks": 8}, r"has no setting 'ranks'; it takes alpha, alpha_pattern, dropout, .*, target_modules\."),
    ],
)  # fmt: skip
def test_settings_are_checked_when_built(kind, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        kind(**settings)
    if "target_modules" not in settings:
        assert kind.__name__ in str(caught.value)


def test_dora_axis_is_checked():
    with pytest.raises(ConfigError, match="DoRA: magnitude_axis must be one of output, input, got 'in'"):
        DoRA(magnitude_axis="in")
    with pytest.raises(ConfigError, match="'input' is defined for linear layers, and 'embed' is an embedding"):
        list(DoRA(r=2, magnitude_axis="input", target_modules=["embed"]).adapters(PlainView(Model())))


def test_methods_are_frozen_and_keyword_only():
    method = LoRA(r=4)
    with pytest.raises(AttributeError):
        method.r = 8
    with pytest.raises(ConfigError, match="takes its settings by name"):
        LoRA(4)
    assert method == LoRA(r=4) != LoRA(r=5)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_rank_larger_than_the_layer(kind):
    view = PlainView(nn.Sequential(nn.Linear(8, 3)))
    with pytest.raises(ConfigError, match=r"r=4 is larger than '0' allows: its weight is 3 x 8, so r is at most 3"):
        list(kind(r=4).adapters(view))
    assert len(list(kind(r=4, rank_pattern={"0": 3}).adapters(view))) == 1


def test_an_embedding_with_max_norm_is_refused():
    with pytest.raises(TargetError, match="'0' is an embedding with max_norm"):
        list(LoRA(r=2, target_modules=["0"]).adapters(PlainView(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)))))
