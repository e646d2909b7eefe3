from pathlib import Path

import pytest

from lora_lightning.config.functions import call_from_arguments
from lora_lightning.errors import ConfigError


def add(left: int, right: float = 1.0, names: list[str] | None = None) -> tuple[int, float, list[str] | None]:
    """Add two numbers.

    Args:
        left: The first.
        right: The second.
        names: What to call them.
    """
    return left, right, names


def call(*arguments):
    return call_from_arguments("prog add", add, arguments)


def test_settings_come_from_flags_and_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("left: 3\nright: 1e-3\n")
    assert call("--left", "2") == (2, 1.0, None)
    assert call("--config", str(path)) == (3, 1e-3, None)
    assert call("--config", str(path), "--left=4", "--names", "[a, b]") == (4, 1e-3, ["a", "b"])
    assert call("--config", "{left: 5}") == (5, 1.0, None)


def test_help_comes_from_the_docstring(capsys):
    with pytest.raises(SystemExit):
        call("--help")
    shown = capsys.readouterr().out
    assert "Add two numbers" in shown
    assert "What to call them" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "`left` is missing; give an int"),
        (["--left", "x"], "left: expected an int, got 'x'"),
        (["--lef", "1"], "unknown option `--lef`; did you mean `--left`?"),
        (["--left", "1", "--names", "{a: 1}"], "names: expected a list of strings"),
        (["--config", "gone.yaml"], "no config file 'gone.yaml'"),
        (["--config", "{left"], "not a mapping in YAML"),
        (["--config", "{left: 1, rigt: 2}"], "unknown key `rigt`; did you mean `right`?"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert words in str(error.value)


def test_mistakes_in_a_file_name_its_line(tmp_path):
    path = Path(tmp_path, "a.yaml")
    path.write_text("right: 2\nleft: x\n")
    with pytest.raises(ConfigError, match=r"a.yaml, line 2: left: expected an int, got 'x'"):
        call("--config", str(path))
