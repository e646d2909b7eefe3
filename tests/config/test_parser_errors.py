import pytest

from lora_lightning.config.parser_errors import reduce_error, unknown_options

NESTED = """\
Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'toy.Task'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'toy.Task':
        Parser key "method":
          Does not validate against any of the Union subtypes
          Errors:
            - Problem with given class_path 'toy.LoRA':
                Parser key "r":
                  Expected a <class 'int'>. Got value: 8x
            - Expected a <class 'list'>
            - Expected a <class 'NoneType'>
  Given value: {'class_path': 'toy.Task'}
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (NESTED, "model.method.r: Expected a int. Got value: 8x"),
        ('Parser key "x": no such thing', "x: no such thing"),
        ("Option 'rr' is not accepted", "Option 'rr' is not accepted"),
        ("Errors:\n- Expected a <class 'NoneType'>", "Errors: - Expected a <class 'NoneType'>"),
    ],
)
def test_reduce_error(text, line):
    assert reduce_error(text) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("unrecognized arguments: --sed=3", "unknown option `--sed`; did you mean `--seed`?"),
        ("unrecognized arguments: --zzz 1 2", "unknown option `--zzz`; options: --model, --seed"),
        ("unrecognized arguments: 1 2", "unexpected words: 1 2; settings are given as --name value"),
        ("something else", None),
    ],
)
def test_unknown_options(text, line):
    assert unknown_options(text, ["--model", "--seed"]) == line
