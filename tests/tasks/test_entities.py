"""Entities and their counts against hand-made expectations, and against regular expressions over the tags."""

import itertools
import random
import re

import pytest
import torch

from lora_lightning.tasks.entities import (
    Entity,
    EntityF1,
    EntityPrecision,
    EntityRecall,
    count_matches,
    entities,
    has_prefixes,
)

NAMES = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),  # neighbours of one type
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),  # another type begins an entity
        ("I-PER I-PER O I-PER", [("PER", 0, 2), ("PER", 3, 4)]),  # IOB1
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
        ("S-PER I-PER", [("PER", 0, 1), ("PER", 1, 2)]),  # BIOES: a single one is over
        ("B-PER I-PER E-PER E-PER", [("PER", 0, 3), ("PER", 3, 4)]),
        ("B-PER L-PER U-LOC", [("PER", 0, 2), ("LOC", 2, 3)]),  # BILOU
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_entities_of_tags(tags, expected):
    assert entities(tags.split()) == [Entity(*one) for one in expected]


def test_tags_without_prefixes_are_tokens():
    assert entities(["NOUN", "NOUN", "O"], prefixed=False) == [("NOUN", 0, 1), ("NOUN", 1, 2)]
    assert [has_prefixes(names) for names in (NAMES, ["NOUN", "O"], ["0", "1"], ["O"])] == [True, False, False, False]


def test_tags_of_both_kinds_are_told_and_taken_as_tokens():
    with pytest.warns(UserWarning, match=r"'B-PER'.* and some have none \('MISC'\)"):
        assert not has_prefixes(["B-PER", "I-PER", "MISC", "O"])


def runs(tags):
    """Find entities another way: each tag is a letter, and a pattern finds the runs."""
    text = "".join("O" if tag == "O" else tag[0] + {"PER": "p", "LOC": "l"}[tag[2:]] for tag in tags)
    text = text.replace("O", "--")
    found = re.finditer(r"[BI]p(?:Ip)*|[BI]l(?:Il)*", text)
    return {({"p": "PER", "l": "LOC"}[run.group()[1]], run.start() // 2, run.end() // 2) for run in found}


def test_counts_equal_those_of_a_pattern():
    rng = random.Random(0)
    differs = 0
    for _ in range(300):
        ours, theirs = (rng.choices(NAMES, k=8) for _ in range(2))
        found, wanted = runs(ours), runs(theirs)
        assert count_matches(ours, theirs) == (len(found & wanted), len(found - wanted), len(wanted - found))
        differs += count_matches(ours, theirs, prefixed=False) != count_matches(ours, theirs)
    assert differs > 100  # control


def scores(predictions, targets, names=NAMES):
    metrics = [kind(names) for kind in (EntityPrecision, EntityRecall, EntityF1)]
    for metric in metrics:
        metric.update(torch.tensor(predictions), torch.tensor(targets))
    return [float(metric.compute()) for metric in metrics]


def test_scores_by_hand():
    """Two rows: PER found with a wrong end, LOC found, an extra PER; the second row's LOC is missed."""
    index = {name: place for place, name in enumerate(NAMES)}
    expected = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-LOC", "I-LOC", "O", "O", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC", "B-PER"], ["O", "O", "O", "O", "O"]]
    ids = [[[index[tag] for tag in row] for row in rows] for rows in (predicted, expected)]
    assert scores(*ids) == pytest.approx([1 / 3, 1 / 3, 1 / 3])  # 1 of 3 predicted, 1 of 3 expected
    assert scores(ids[1], ids[1]) == [1, 1, 1]
    assert scores(ids[0], [[index["O"]] * 5] * 2) == [0, 0, 0]


def test_ignored_tokens_are_no_part_of_the_sequence():
    """A subword between two words neither ends an entity nor counts, whatever is predicted there."""
    index = {name: place for place, name in enumerate(NAMES)}
    b, i, o = index["B-PER"], index["I-PER"], index["O"]
    assert scores([[o, b, b, i, o]], [[-100, b, -100, i, -100]]) == [1, 1, 1]
    assert scores([[o, b, b, i, o]], [[-100, b, o, i, -100]]) != [1, 1, 1]


def test_without_prefixes_tokens_are_scored():
    assert scores([[0, 1, 1, 2]], [[0, 1, 0, 2]], ["ADJ", "NOUN", "O"]) == pytest.approx([2 / 3, 2 / 3, 2 / 3])


def test_states_of_ranks_are_summed():
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 5, (2, 2, 4, 9), generator=generator)
    for kind in (EntityPrecision, EntityRecall, EntityF1):
        other, whole, alone = (kind(NAMES) for _ in range(3))
        other.update(*batches[1])
        theirs = itertools.cycle([getattr(other, name) for name in other._reductions])

        def gather(mine, group, theirs=theirs):
            """Give what torchmetrics gets from two ranks: a state of ours, and the same one of the other's."""
            assert group is None
            return [mine, next(theirs)]

        one = kind(NAMES, dist_sync_fn=gather, distributed_available_fn=lambda: True)
        one.update(*batches[0])
        alone.update(*batches[0])
        for batch in batches:
            whole.update(*batch)
        assert float(one.compute()) == pytest.approx(float(whole.compute()))
        assert float(one.compute()) != pytest.approx(float(alone.compute()))
