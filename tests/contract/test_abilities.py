"""The matrix of methods against abilities in the documentation is what is found anew."""

import pytest

from tests.contract.abilities import ABILITIES, COMPILING, PAGE, ROWS, YES, answers_of, page_text, read_page
from tests.contract.examples import concrete_methods

TEXT = PAGE.read_text(encoding="utf-8")
MATRIX = read_page(TEXT)


def test_the_page_has_every_method_and_every_ability():
    assert list(MATRIX) == list(ROWS)
    assert {f"`{cls.__name__}`" for cls in concrete_methods()} <= set(MATRIX)
    assert all(list(answers) == list(ABILITIES) for answers in MATRIX.values())
    assert page_text(MATRIX) == TEXT


def test_a_cell_without_its_ability_has_a_reason():
    answers = [answer for answers in MATRIX.values() for answer in answers.values()]
    reasons = {answer for answer in answers if answer != YES}
    assert all(len(reason) > 40 for reason in reasons)
    assert 0 < len(reasons) < answers.count(YES)


@pytest.mark.parametrize("row", ROWS)
def test_the_answers_are_those_of_the_page(row):
    quick = set(ABILITIES) - set(COMPILING)
    assert answers_of(row, quick) == {ability: MATRIX[row][ability] for ability in quick}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize("row", ROWS)
def test_the_answers_under_a_compiler_are_those_of_the_page(row):
    assert answers_of(row, COMPILING) == {ability: MATRIX[row][ability] for ability in COMPILING}


def test_what_is_computed_wrong_is_no_answer(monkeypatch):
    """An ability that gives another result fails, and is not written down as missing."""
    monkeypatch.setattr("tests.contract.abilities.merge", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="merged: differs by"):
        answers_of("`LoRA`", ["merged"])
