"""What a causal language model answers to prompts."""

import pytest
import torch

from lora_lightning.adapters import disabled
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.methods import PromptTuning, PTuningV2
from lora_lightning.tasks.causal_lm import check_batch
from lora_lightning.tasks.generation import Example, examples_of, generate
from tests import models
from tests.tasks.languages import batches, built, loader
from tests.tasks.toys import trainer


def test_examples_are_the_words_before_what_is_learnt():
    ids = torch.arange(10, 18)[None]
    labels = torch.tensor([[-100, -100, -100, 13, 14, -100, 16, 17]])
    assert examples_of({"input_ids": ids, "labels": labels}) == [Example([10, 11, 12], [13, 14])]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    assert examples_of({"input_ids": ids, "labels": labels, "attention_mask": mask})[0].prompt == [11, 12]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    assert examples_of({"input_ids": ids, "labels": labels, "position_ids": packed})[0].answer == [13]
    assert examples_of({"input_ids": ids, "labels": ids}) == [Example([10, 11, 12, 13], [14, 15, 16, 17])]
    assert examples_of({"input_ids": ids}) == [Example(ids[0].tolist(), [])]
    assert examples_of({"input_ids": ids, "labels": torch.full_like(ids, -100)})[0].answer == []


def test_predictions_go_on_from_each_prompt_as_if_it_were_alone():
    task = built()
    rows = [{**part, "labels": part["labels"]} for part in batches((12,))]
    (predicted,) = trainer().predict(task, loader(rows))
    for row, example in zip(predicted, examples_of(rows[0]), strict=True):
        assert row["prompt_ids"] == example.prompt
        assert row["generated_ids"] == greedy(task.adapted, example.prompt, 31)
    assert predicted[0]["generated_ids"] != predicted[1]["generated_ids"]


def greedy(model, prompt, length):
    """Return what follows a prompt, word by word, without padding or cache."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) <= length:
            following = int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if following == 2:
                break
            ids.append(following)
    return ids[len(prompt) :][: 32 - len(prompt)]


def test_generating_keeps_modes_and_random_numbers():
    task = built(gradient_checkpointing=True)
    task.adapted.model.layers[0].eval()
    modes = [module.training for module in task.adapted.modules()]
    state = torch.random.get_rng_state()
    drawn = [generate(task.adapted, [[5, 6], [7]], max_new_tokens=9, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [module.training for module in task.adapted.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate(task.adapted, [[5, 6]], max_new_tokens=4, stop=range(64)) == [[]]
    with pytest.raises(ConfigError, match="no tokens"):
        generate(task.adapted, [[5], []])
    with pytest.raises(ConfigError, match="32 tokens leaves no room"):
        generate(task.adapted, [[5] * 32])


@pytest.mark.parametrize("method", [PromptTuning(num_virtual_tokens=4), PTuningV2(num_virtual_tokens=4)])
def test_virtual_tokens_take_their_share_of_the_positions(method):
    model = models.build("gpt2")
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # so that only the positions end an answer
    attach(model, method)
    assert len(generate(model, [[5] * 20], max_new_tokens=99)[0]) == 32 - 4 - 20
    with pytest.raises(ConfigError, match="28 tokens leaves no room: the model takes 28"):
        generate(model, [[5] * 28])
    row = {"input_ids": torch.full((1, 29), 5), "labels": torch.full((1, 29), 5)}
    with pytest.raises(DataError, match="29 tokens, and this model takes 28"):
        check_batch(row, model)
    with disabled(model):
        check_batch(row, model)
        assert len(generate(model, [[5] * 20], max_new_tokens=99)[0]) == 32 - 20
