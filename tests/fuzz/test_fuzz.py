"""Random cases: one hundred in the slow run; `python -m tests.fuzz --cases 2000 --seed 1` for more."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from lora_lightning.adapters import iter_adapters
from tests.fuzz import steps, walk
from tests.fuzz.architectures import Architecture, build
from tests.fuzz.draws import draw
from tests.fuzz.world import Fault, World, digests

SEED = 13
NUM_CASES = 100
CONTROLS = ("what was trained", "adapted and base", "a new model before loading", "a moved copy", "merged and base")


@pytest.fixture
def world(tmp_path):
    base, batch = build(Architecture("bert", "sequence"), torch.float32)
    return World(Architecture("bert", "sequence"), base, batch, random.Random(1), tmp_path, build_again())


def build_again():
    return build(Architecture("bert", "sequence"), torch.float32)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # each of some hundred architectures has its own
def test_random_cases_hold():
    steps.quiet()
    verdicts = [walk.run(SEED, case) for case in range(NUM_CASES)]
    assert [str(verdict) for verdict in verdicts if verdict.fault] == []
    controls = sum((verdict.controls for verdict in verdicts), Counter())
    assert [name for name in CONTROLS if not controls[name]] == []
    assert {name for verdict in verdicts for name in verdict.steps} >= steps.STEPS.keys()


def test_cases_are_drawn_again_from_their_seed():
    first, again, other = (str(walk.run(5, case)) for case in (0, 0, 1))
    assert first == again
    assert first != other


def test_more_than_sixty_architectures_of_every_modality():
    """Their names; whether they build is seen where one is drawn."""
    kinds = Counter(one.kind for one in walk.POOL)
    assert len({one.name for one in walk.POOL}) > 60
    assert {"causal", "seq2seq", "image", "audio", "image-text", "video", "bare"} <= kinds.keys()
    names = {one.name for one in walk.POOL}
    assert {"mamba2", "whisper", "resnet", "mixtral", "wav2vec2", "vit", "t5", "recurrent_gemma"} <= names


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_moves_is_seen(world):
    steps.begin(world)
    steps.base_is_unchanged(world)
    with torch.no_grad():
        world.model.bert.embeddings.word_embeddings.weight[3, 1] += 1e-6
    with pytest.raises(Fault, match=r"the base moved: 1 tensors"):
        steps.base_is_unchanged(world)


@pytest.mark.filterwarnings("ignore")
def test_a_lost_tensor_is_seen(world, monkeypatch):
    steps.begin(world)
    steps.reload(world)
    monkeypatch.setattr(steps, "load_adapter_state_dict", lambda model, state: forget_one(world, model, state))
    with pytest.raises(Fault, match="reloaded: off by"):
        steps.reload(world)


def forget_one(world, model, state):
    from lora_lightning.adapters import load_adapter_state_dict

    load_adapter_state_dict(model, state)
    with torch.no_grad():
        next(iter_adapters(model))[2].parameters().__next__().mul_(1.5)


def test_buffers_are_hashed_too():
    base = build(Architecture("resnet", "image"), torch.float32)[0]
    before = digests(base)
    next(base.buffers()).add_(1)
    assert sum(before[name] != digest for name, digest in digests(base).items()) == 1


def test_methods_are_drawn_with_what_models_have():
    base = build_again()
    drawn = [draw(base, random.Random(seed)) for seed in range(200)]
    assert len({type(method) for one in drawn for method in one.methods}) == 15
    assert any(len(one.methods) > 1 for one in drawn)
