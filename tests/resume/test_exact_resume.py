"""A run that is stopped at any batch and resumed has the losses and weights of the one that was not."""

from __future__ import annotations

import itertools
import random
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning import AdaLoRA, BitFit, DeltaLoRA, DoRA, LoRA, LoRADrop, Optim, VeRA
from lora_lightning.resume import ExactResume
from tests.resume.runs import (
    BATCH_SIZE,
    NUM_BATCHES,
    NUM_EPOCHS,
    PlainLoaders,
    Reader,
    SaveAfter,
    TokenCounter,
    Tokens,
    fit,
)

pytestmark = [
    # Two workers on a machine with one core.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # The continued run need not save.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
LAST = NUM_BATCHES * NUM_EPOCHS
HOSTS = ["2", "5"]
METHODS = {
    "lora": LoRA(r=2, dropout=0.2, target_modules=HOSTS),
    "adalora": AdaLoRA(target_r=2, init_r=4, t_init=1, t_final=2, delta_t=2, dropout=0.1, target_modules=HOSTS),
    "lora_drop": LoRADrop(r=2, dropout=0.2, calibration_steps=3, sample_batches=2, target_modules=HOSTS),
    "delta_lora": DeltaLoRA(r=2, start_step=2, target_modules=HOSTS),
    "list": [DoRA(r=2, dropout=0.2, target_modules=["5"]), BitFit()],
    "vera": VeRA(r=4, dropout=0.2, target_modules=["2"]),
}
VALIDATIONS = ({}, {"limit_val_batches": 1.0, "val_check_interval": 3}, {"limit_val_batches": 2})
ENDS = ({}, {"max_epochs": -1, "max_steps": LAST})


@dataclass(frozen=True)
class Case:
    """Settings of a run."""

    method: str = "lora"
    task: type = Reader
    data: Any = Tokens
    num_workers: int = 0
    accumulate: int = 1
    schedule: str = "constant"
    validation: int = 0
    end: int = 0

    def fit(self, *callbacks: L.Callback, task: Any = None, **others: Any) -> Any:
        optim = Optim(lr=0.05, schedule=self.schedule, warmup=2)
        end = dict(ENDS[self.end])
        if end:
            end["max_steps"] = -(-NUM_BATCHES // self.accumulate) * NUM_EPOCHS
        trainer = {"accumulate_grad_batches": self.accumulate, **VALIDATIONS[self.validation], **end}
        made = (task or self.task)(METHODS[self.method], optim)
        return fit(made, self.data(num_workers=self.num_workers), *callbacks, **{**trainer, **others})


def assert_same(full: Any, continued: Any, after: int) -> None:
    """Losses after the stop, epochs, and final weights are equal bit for bit."""
    wanted = {number: loss for number, loss in full[0].losses.items() if number > after}
    assert continued[0].losses == wanted
    assert continued[0].epochs == {number: full[0].epochs[number] for number in wanted}
    assert full[1].keys() == continued[1].keys()
    for name, weight in full[1].items():
        assert torch.equal(weight, continued[1][name]), name


def check(case: Case, folder: Path, *stops: int, at: str = "batch") -> Any:
    full = case.fit(SaveAfter(folder, stops, at=at))
    for stop in stops:
        assert_same(full, case.fit(seed=99, ckpt_path=folder / f"{stop}.ckpt"), stop)
    return full


def chosen_cases(count: int) -> list[tuple[Case, int, int]]:
    """Shuffle each setting's values, so that all of them occur, and draw two stops for each combination."""
    draw = random.Random(20)

    def values(*options: Any) -> list[Any]:
        repeated = list(itertools.islice(itertools.cycle(options), count))
        draw.shuffle(repeated)
        return repeated

    settings_of = zip(
        values(*METHODS),
        values(Reader, TokenCounter),
        values(Tokens, Tokens, PlainLoaders),
        values(0, 2),
        values(1, 2, 3),
        values("linear", "cosine", "constant"),
        values(0, 1, 2),
        values(0, 1),
        strict=True,
    )
    return [(Case(*values), *draw.sample(range(1, LAST), 2)) for values in settings_of]


@pytest.mark.parametrize(("case", "first", "second"), chosen_cases(10))
def test_twenty_random_stops(case, first, second, tmp_path):
    full = check(case, tmp_path, first, second)
    assert sorted(full[0].losses) == list(range(1, LAST + 1))
    assert len(set(full[0].losses.values())) > LAST // 2


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(
    st.builds(
        Case,
        method=st.sampled_from(sorted(METHODS)),
        task=st.sampled_from([Reader, TokenCounter]),
        data=st.sampled_from([Tokens, PlainLoaders]),
        accumulate=st.integers(1, 4),
        schedule=st.sampled_from(["linear", "cosine"]),
        validation=st.integers(0, 2),
        end=st.integers(0, 1),
    ),
    st.integers(1, LAST - 1),
)
def test_any_settings_at_any_batch(case, stop):
    with tempfile.TemporaryDirectory() as folder:
        check(case, Path(folder), stop)


class Without(Reader):
    """Has no ExactResume."""

    def configure_callbacks(self):
        return []


# Each is left out, or changed by little, and must be missed.


@pytest.fixture(scope="module")
def mid_epoch(tmp_path_factory):
    """A run with accumulation, saved between the batches of a step."""
    folder = tmp_path_factory.mktemp("mid_epoch")
    case = Case(accumulate=2, schedule="linear")
    return case, case.fit(SaveAfter(folder, [10])), folder / "10.ckpt"


def draw_once_more(saved):
    state = saved["ranks"][0]["random"]
    generator = torch.Generator()
    generator.set_state(state["cpu"])
    torch.rand(1, generator=generator)
    state["cpu"] = generator.get_state()


def one_batch_late(saved):
    saved["position"]["passed"][0][0] += 1


def another_epoch(saved):
    saved["position"]["epoch"] += 1


def no_gradients(saved):
    saved["ranks"][0]["unfinished"] = None


@pytest.mark.parametrize("change", [None, draw_once_more, one_batch_late, another_epoch, no_gradients])
def test_every_part_of_the_state_is_needed(mid_epoch, tmp_path, change):
    case, full, path = mid_epoch
    checkpoint = torch.load(path, weights_only=True)
    if change is not None:
        change(checkpoint["exact_resume"])
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    continued = case.fit(seed=99, ckpt_path=tmp_path / "changed.ckpt")
    if change is None:
        assert_same(full, continued, 10)
    else:
        assert any(loss != full[0].losses.get(number) for number, loss in continued[0].losses.items())


def test_without_the_callback_nothing_is_exact(tmp_path):
    full = Case().fit(SaveAfter(tmp_path, [10]), task=Without)
    continued = Case().fit(task=Without, seed=99, ckpt_path=tmp_path / "10.ckpt")
    assert not any(full[0].losses[number] == loss for number, loss in continued[0].losses.items())
    with pytest.warns(UserWarning, match="holds no data position and no random numbers"):
        Case().fit(seed=99, ckpt_path=tmp_path / "10.ckpt")


# Where checkpoints are written, and what a user changes between the runs.


@pytest.mark.parametrize(
    ("at", "stops", "case"),
    [
        ("validation", (3, 10), Case(validation=1)),
        ("epoch", (7, 14), Case(end=1)),
        ("epoch", (7, 14), Case(data=PlainLoaders)),
        ("batch", (7, 14), Case(validation=2, end=1)),
    ],
)
def test_at_the_end_of_a_batch_a_validation_and_an_epoch(at, stops, case, tmp_path):
    check(case, tmp_path, *stops, at=at)


def test_a_run_that_max_steps_ended_goes_on_in_the_same_epoch(tmp_path):
    full = Case().fit(max_epochs=-1, max_steps=LAST)
    Case().fit(L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True), max_epochs=-1, max_steps=10)
    continued = Case().fit(seed=99, ckpt_path=tmp_path / "last.ckpt", max_epochs=-1, max_steps=LAST)
    assert_same(full, continued, 10)


class Fails(Reader):
    """Fails amid the eleventh batch, after drawing a random number."""

    in_backward = False

    def compute_loss(self, batch):
        output = super().compute_loss(batch)
        if self.trainer.fit_loop.total_batch_idx == 10:
            if self.in_backward:
                output.loss.register_hook(self.fail)
            else:
                self.fail()
        return output

    def fail(self, *_):
        torch.rand(3)
        raise RuntimeError("amid a batch")


class FailsInBackward(Fails):
    in_backward = True


def test_after_an_error_amid_a_batch(tmp_path):
    case = Case(accumulate=2)
    full = case.fit()
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="x", save_on_exception=True)
    with pytest.raises(RuntimeError, match="amid a batch"):
        case.fit(saving, task=Fails)
    assert_same(full, case.fit(seed=99, ckpt_path=tmp_path / "x.ckpt"), 10)


def test_an_error_in_backward_loses_the_step_and_says_so(tmp_path):
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="x", save_on_exception=True)
    with pytest.raises(RuntimeError, match="amid a batch"), pytest.warns(UserWarning, match="partly added"):
        Case(accumulate=2).fit(saving, task=FailsInBackward)
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["exact_resume"]["ranks"][0]["unfinished"] is None


def test_twice_in_one_epoch(tmp_path):
    full = Case(accumulate=3).fit(SaveAfter(tmp_path, [9]))
    Case(accumulate=3).fit(SaveAfter(tmp_path, [11]), seed=98, ckpt_path=tmp_path / "9.ckpt")
    assert_same(full, Case(accumulate=3).fit(seed=99, ckpt_path=tmp_path / "11.ckpt"), 11)


def test_validation_does_not_change_training():
    often, never = Case(data=PlainLoaders, validation=1).fit(), Case(data=PlainLoaders).fit()
    assert often[0].num_validations == 6
    assert often[0].losses == never[0].losses


@pytest.mark.parametrize("data", [Tokens, PlainLoaders])
def test_changed_data_are_told(data, tmp_path):
    Case(data=data).fit(SaveAfter(tmp_path, [9]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Reader(), Tokens(num_rows=36), seed=99, ckpt_path=tmp_path / "9.ckpt")
    messages = " ".join(str(one.message) for one in told)
    assert "An epoch had 7 batches when the checkpoint was written, and has 9 now" in messages
    assert ("fingerprints differ" in messages) == (data is Tokens)


class Draws(Reader):
    """Draws random numbers while an epoch begins."""

    def on_train_epoch_start(self):
        torch.rand(1)


def test_an_order_that_cannot_be_brought_back_is_told(tmp_path):
    Case(data=PlainLoaders).fit(SaveAfter(tmp_path, [9]), task=Draws)
    with pytest.warns(UserWarning, match="order cannot be brought back: something drew random numbers"):
        Case(data=PlainLoaders).fit(task=Draws, ckpt_path=tmp_path / "9.ckpt")
    check(Case(data=Tokens), tmp_path, 9)  # data of this library do not mind


@pytest.mark.filterwarnings("ignore:The run has 1 optimizer steps and warmup is 2")
def test_a_users_own_callback_stays():
    mine = ExactResume()
    trace, _ = Case().fit(mine, max_steps=1)
    assert len(trace.losses) == 1


def test_another_batch_size_takes_the_rows_that_are_left(tmp_path):
    full = Case().fit(SaveAfter(tmp_path, [9]))

    def reader():
        return Reader(optim=Optim(lr=0.05, schedule="constant", warmup=2))  # as that of the case

    continued, _ = fit(reader(), Tokens(batch_size=3), seed=99, ckpt_path=tmp_path / "9.ckpt")

    def rows(trace, numbers):
        return sorted(tuple(token for token in row if token) for number in numbers for row in trace.rows[number])

    num_left = -(-(26 - 2 * BATCH_SIZE) // 3)
    of_epoch = [number for number, epoch in continued.epochs.items() if epoch == 1]
    assert len(of_epoch) == num_left
    assert rows(continued, of_epoch) == rows(full[0], range(10, 15))
    assert sum(epoch == 2 for epoch in continued.epochs.values()) == -(-26 // 3)
    again = fit(reader(), Tokens(batch_size=3), SaveAfter(tmp_path, [11]), ckpt_path=tmp_path / "9.ckpt")
    assert_same(again, fit(reader(), Tokens(batch_size=3), seed=99, ckpt_path=tmp_path / "11.ckpt"), 11)
