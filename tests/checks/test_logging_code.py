import functools
import math

import pytest

from lora_lightning.checks.logging_code import logs_by_itself


class Silent:
    def step(self):
        return math.sqrt(4.0) + len(self.logits())

    def logits(self):
        return "log_softmax"


def tell(task):
    task.log("val/mine", 1.0)


def tell_later(task):
    return tell(task)


class Direct(Silent):
    def step(self):
        self.log("val/mine", 1.0)


class Several(Silent):
    def step(self):
        self.log_dict({"val/mine": 1.0})


class Nested(Silent):
    def step(self):
        return [self.log(name, 1.0) for name in ("val/a", "val/b")]


class ByName(Silent):
    def step(self):
        getattr(self, "log")("val/mine", 1.0)  # noqa: B009 - as some write it


class Helped(Silent):
    def step(self):
        tell_later(self)


class Decorated(Silent):
    @functools.lru_cache  # noqa: B019 - only read, never called
    def step(self):
        self.log("val/mine", 1.0)


class Property(Silent):
    @property
    def quality(self):
        return self.log("val/mine", 1.0)


class Storing(Silent):
    def step(self, trainer):
        trainer.callback_metrics["val/mine"] = 1.0


class Updating(Silent):
    def step(self, trainer):
        trainer.callback_metrics.update({"val/mine": 1.0})


class Reading(Silent):
    def step(self, trainer):
        return trainer.callback_metrics["val/loss"]


class Holding(Silent):
    def __init__(self):
        self.tool = Direct()


class HoldingAFunction(Silent):
    def __init__(self):
        self.call = functools.partial(tell, None)


class Declaring(Direct):
    def logged_metrics(self):
        return {"val/mine": None}


class LoggingMore(Declaring):
    def other(self):
        self.log("val/more", 1.0)


LOGGING = [
    *(Direct, Several, Nested, ByName, Helped, Decorated, Property, Storing, Updating, Holding, HoldingAFunction),
    LoggingMore,
]


@pytest.mark.parametrize("cls", LOGGING)
def test_code_that_logs(cls):
    assert logs_by_itself(cls())


@pytest.mark.parametrize("cls", [Silent, Reading, Declaring])
def test_code_that_does_not_log_more_than_it_declares(cls):
    assert not logs_by_itself(cls())
