"""An encoder with a small tokenizer that knows the end marks of the usual templates."""

import pytest
from transformers import AutoTokenizer

from lora_lightning.data.language.encoding import Encoder
from tests.data.talk import save_tokenizer

END_MARKS = ("<eos>", "<|im_end|>")
EXTRA = ("<|end|>", "<|return|>", "<|call|>", "<|eot_id|>", "<end_of_turn>", "</s>")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.add_special_tokens({"additional_special_tokens": list(EXTRA)})
    marks = tokenizer.convert_tokens_to_ids([*END_MARKS, *EXTRA])

    def _build(template, **settings):
        # Every end mark is one at which the model stops, so that nothing is added behind it.
        ends = {"end_id": tokenizer.eos_token_id, "stop_ids": frozenset(marks), "turn_end_ids": frozenset(marks)}
        return Encoder(
            tokenizer=tokenizer, tokenizer_name="toy", template=template, **{"max_length": 999, **ends, **settings}
        )

    return _build
