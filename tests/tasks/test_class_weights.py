"""Weights of classes by names of any kind, and balanced ones, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from lora_lightning.errors import ConfigError
from lora_lightning.tasks.class_weights import balanced_weights, weights_by_name


@pytest.mark.parametrize(
    ("weights", "names", "expected"),
    [
        ({0: 1.0, 1: 5}, ["0", "1"], {"0": 1.0, "1": 5.0}),
        ({"good": 2.0}, ["bad", "good"], {"good": 2.0}),
        ({True: 3.0, False: 0.5}, ["False", "True"], {"True": 3.0, "False": 0.5}),
        ({True: 3.0}, ["false", "true"], {"true": 3.0}),
        ({False: 3.0}, ["no", "yes"], {"no": 3.0}),  # as YAML reads `no: 3.0`
    ],
)
def test_keys_of_any_kind_are_names(weights, names, expected):
    assert weights_by_name(weights, names) == expected


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({2: 1.0}, "names 2, and the labels are 0, 1"),
        ({"great": 2.0}, "names great, and the labels are 0, 1"),
        ({True: 1.0}, "names True, and the labels are 0, 1"),
        ({0: -1.0}, "gives '0' the weight -1.0; expected a number of at least 0"),
        ({0: float("nan")}, "gives '0' the weight nan"),
        ({0: 0.0, 1: 0.0}, "every label the weight 0"),
    ],
)
def test_each_mistake_has_its_own_sentence(weights, words):
    with pytest.raises(ConfigError, match=words):
        weights_by_name(weights, ["0", "1"])


def test_balanced_weights_are_those_of_scikit_learn():
    counts = {"b": 60, "a": 30, "c": 7}
    labels = np.repeat(["a", "b", "c"], [30, 60, 7])
    expected = compute_class_weight("balanced", classes=np.array(["c", "a", "b"]), y=labels)
    assert list(balanced_weights(counts, ["c", "a", "b"]).values()) == pytest.approx(expected.tolist(), rel=1e-12)
    assert balanced_weights({**counts, "d": 0}, ["a", "d"])["d"] == 1.0


def test_balanced_weights_need_counts():
    with pytest.raises(ConfigError, match=r"`label_counts`.*TextClassificationData, or give the weights by name"):
        balanced_weights(None, ["a", "b"])
