import pytest

from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.backbones.tokenizer_identity import check_tokenizer, tokenizer_fingerprint, tokenizer_of
from lora_lightning.errors import CheckpointError
from tests.checkpoint.runs import WORDS


def tokenizer(folder, words):
    from transformers import BertTokenizerFast

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_the_vocabulary_counts_and_nothing_else(tmp_path):
    first, again = tokenizer(tmp_path / "a", WORDS), tokenizer(tmp_path / "b", WORDS)
    again.padding_side, again.model_max_length = "left", 7
    again("w1 w2", truncation=True, max_length=3)
    digest = tokenizer_fingerprint(first)
    assert len(digest) == 64
    assert tokenizer_fingerprint(again) == digest
    check_tokenizer(again, digest, "x")
    swapped = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    other = tokenizer(tmp_path / "c", swapped)
    assert set(other.get_vocab()) == set(first.get_vocab())
    with pytest.raises(CheckpointError, match=rf"^x was trained with another tokenizer: .*{digest[:12]}.*c has"):
        check_tokenizer(other, digest, "x")


def test_what_has_no_vocabulary_is_not_compared():
    assert tokenizer_fingerprint(None) is None
    assert tokenizer_of(None) is None
    check_tokenizer(None, "0" * 64, "x")
    check_tokenizer(object(), None, "x")
