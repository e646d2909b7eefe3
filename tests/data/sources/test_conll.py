"""Comments and numbers in files with one word and its tag a line."""

import pytest

from lora_lightning.errors import DataError
from tests.data.sources.conftest import fields_of

COMMENTS = [
    "# sent_id = 1\n# text = a b\n",
    "# global.columns = ID FORM\n",
    "# id 5239d808\tdomain=train\n",
    "# newdoc\n",
    "-DOCSTART- -X- O\n# x y = 2\n",
]


@pytest.mark.parametrize("comment", COMMENTS)
@pytest.mark.parametrize("name", ["a.conll", "a.iob2", "a.txt"])
def test_comments_before_a_sentence_are_left_out(write, name, comment):
    words = "a NN O\nb NN B-X\n"
    path = write(name, f"{comment}{words}\n{comment}{words}")
    assert fields_of(path, conll=True) == [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}] * 2


def test_a_hash_may_be_a_word(write):
    path = write("a.conll", "# O\na O\n\na O\n# text = b\n# B-X\n\n#\tO\n")
    found = [(row["tokens"], row["tags"]) for row in fields_of(path, conll=True)]
    assert found == [(["#", "a"], ["O", "O"]), (["a", "#", "#"], ["O", "b", "B-X"]), (["#"], ["O"])]


def test_words_that_are_numbered_are_asked_about(write):
    numbered = "1 a O\n2 b O\n3 c B-X\n"
    path = write("a.conll", "1 a O\n\n# text = a b c\n" + numbered)
    with pytest.raises(DataError, match=r"a\.conll, line 4: the first column numbers the words .* Set token_column"):
        fields_of(path, conll=True)
    assert fields_of(path, conll=True, token_column=1)[1]["tokens"] == ["a", "b", "c"]
    assert fields_of(path, conll=True, token_column=0)[1]["tokens"] == ["1", "2", "3"]
    for others in (numbered.replace("2 b", "5 b"), "1 O\n2 O\n3 B-X\n"):  # controls
        assert len(fields_of(write("a.conll", others), conll=True)) == 1
