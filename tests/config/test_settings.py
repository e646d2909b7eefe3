import pytest

from lora_lightning.config.settings import collect, is_config_text, set_flag
from lora_lightning.errors import ConfigError

CONFIG = "model:\n  class_path: Task\n  init_args:\n    method: {class_path: LoRA, init_args: {r: 8}}\n"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.mark.parametrize("option", [["--config"], ["-c"]])
def test_flags_go_over_the_file_through_init_args(config, option):
    settings = collect([*option, config, "--model.method.r", "4", "--trainer.max_epochs=2", "--seed", "1e-3"])
    assert settings.tree == {
        "model": {
            "class_path": "Task",
            "init_args": {"method": {"class_path": "LoRA", "init_args": {"r": 4}}},
        },
        "trainer": {"max_epochs": 2},
        "seed": 1e-3,
    }
    assert settings.origin(("model", "class_path")) == f"{config}, line 2"
    assert settings.origin(("model", "init_args", "method", "init_args", "alpha")) == f"{config}, line 4"
    assert settings.origin(("model", "init_args", "method", "init_args", "r")) == ""
    assert settings.origin(("trainer",)) == ""


def test_short_forms_of_the_config_option(config):
    assert collect([f"-c{config}"]).tree == collect([f"-c={config}"]).tree == collect([f"--config={config}"]).tree


def test_another_class_drops_the_arguments_of_the_old_one(config):
    tree = collect(["-c", config, "--model.method", "DoRA"]).tree
    assert tree["model"]["init_args"]["method"] == {"class_path": "DoRA"}
    same = collect(["-c", config, "--model.method", "LoRA"]).tree
    assert same["model"]["init_args"]["method"] == {"class_path": "LoRA", "init_args": {"r": 8}}


def test_class_by_name_then_its_arguments():
    tree = collect(["--model", "Task", "--model.method", "LoRA", "--model.method.r", "4"]).tree
    method = {"class_path": "LoRA", "init_args": {"r": 4}}
    assert tree == {"model": {"class_path": "Task", "init_args": {"method": method}}}


def test_later_files_go_over_earlier_ones(config):
    tree = collect(["-c", config, "-c", "{model: {init_args: {method: {init_args: {r: 2}}}}}"]).tree
    assert tree["model"]["init_args"]["method"]["init_args"] == {"r": 2}


def test_values_that_are_no_yaml_are_strings():
    assert collect(["--a", "[", "--b", "!!python/name:x", "--c", "{a: 1}"]).tree == {
        "a": "[",
        "b": "!!python/name:x",
        "c": {"a": 1},
    }


def test_words_without_a_value_are_left_out():
    assert collect(["word", "--last"]).tree == {}


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        collect(["--config", str(tmp_path / "gone.yaml")])


def test_set_flag_returns_where_it_went():
    tree = {"model": {"class_path": "Task"}}
    assert set_flag(tree, ["model", "r"], 1) == ("model", "init_args", "r")
    assert set_flag(tree, ["model", "init_args", "r"], 2) == ("model", "init_args", "r")
    assert tree == {"model": {"class_path": "Task", "init_args": {"r": 2}}}


def test_config_text():
    assert is_config_text("{a: 1}")
    assert is_config_text("a: 1\nb: 2")
    assert not is_config_text("a.yaml")


def test_sections_in_files_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "model.yaml").write_text("class_path: Task\ninit_args:\n  r: 3\n")
    config = tmp_path / "a.yaml"
    config.write_text("seed: 1\nmodel: model.yaml\n")
    settings = collect(["--config", str(config)])
    assert settings.tree == {"seed": 1, "model": {"class_path": "Task", "init_args": {"r": 3}}}
    assert settings.origin(("model", "init_args", "r")).endswith("model.yaml, line 3")
    monkeypatch.chdir(tmp_path)
    assert collect(["--model", "model.yaml"]).tree == {"model": settings.tree["model"]}
    assert collect(["--data.train", "model.yaml"]).tree == {"data": {"train": "model.yaml"}}
    (tmp_path / "model.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match=r"model.yaml, line 2: the key `a` is there twice"):
        collect(["--config", str(config)])
