"""Memory that runs out becomes a sentence with the batch and what to change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_lightning.callbacks import OutOfMemoryGuard
from lora_lightning.callbacks.out_of_memory_guard import _hints, is_out_of_memory
from tests.callbacks.runs import BATCH_SIZE, LIGHTNING_WARNINGS, LineData, LineTask, fit

pytestmark = LIGHTNING_WARNINGS
REAL = "torch.empty(1 << 50): the allocator itself refuses"


class Hungry(LineTask):
    """Runs out of memory in the third training batch, or in the first of validation."""

    def __init__(self, error: Any = REAL, where: str = "training_step") -> None:
        super().__init__()
        self.error, self.where = error, where

    def _eat(self) -> None:
        if self.error == REAL:
            torch.empty(1 << 50)
        raise self.error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.where == "training_step" and batch_idx == 2:
            self._eat()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.where == "validation_step":
            self._eat()

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self._eat()
        super().configure_model()


def explained(folder: Path, task: Hungry, kind: type[BaseException] = RuntimeError, **settings: Any) -> str:
    guard, data = OutOfMemoryGuard(), LineData()
    data.batch_size, data.max_length = BATCH_SIZE, 512  # type: ignore[attr-defined]  # as our own data modules have them
    with pytest.raises(kind) as error:
        fit(folder, guard, task=task, data=data, **settings)
    assert guard.error is not None
    assert error.value.__notes__ == [str(guard.error)]
    return str(guard.error)


def test_a_training_step(tmp_path: Path) -> None:
    text = explained(tmp_path, Hungry(), accumulate_grad_batches=3)
    for words in (
        "Out of memory on cpu (tried to allocate 4194304.00 GiB) in a train step of a batch of 4 x 5 tokens, at step 0",
        "(1) data.init_args.batch_size 2 instead of 4 with trainer.accumulate_grad_batches 6 instead of 3",
        "(2) model.init_args.gradient_checkpointing true",
        "(3) a smaller data.init_args.max_length (now 512)",
        "(4) model.init_args.quantization {quant_type: nf4}",
    ):
        assert words in text


def test_what_is_in_place_is_not_proposed(tmp_path: Path) -> None:
    task = Hungry(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"))
    task.configure_model()
    task.gradient_checkpointing = True
    text = explained(tmp_path, task, torch.OutOfMemoryError)
    assert "tried to allocate 2.00 GiB" in text
    assert "gradient_checkpointing" not in text
    assert text.count("init_args") >= 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_checkpointing": "activations"}, "gradient_checkpointing true"),
        ({"gradient_checkpointing": True}, "offload_activations true"),
        ({"gradient_checkpointing": True, "offload_activations": True}, None),
    ],
    ids=str,
)
def test_on_a_gpu_what_backward_keeps_may_go_to_the_host(settings: dict[str, Any], words: str | None) -> None:
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1, datamodule=None)
    module: Any = SimpleNamespace(**settings)
    told = "; ".join(_hints(trainer, module, 4, is_training=True))
    proposed = [one for one in ("gradient_checkpointing true", "offload_activations true") if one in told]
    assert proposed == ([] if words is None else [words])


def test_validation_and_building(tmp_path: Path) -> None:
    text = explained(tmp_path, Hungry(where="validation_step"), num_sanity_val_steps=0)
    assert "in a validate step of a batch of 4 x 5 tokens, at step 6" in text
    assert "(1) data.init_args.eval_batch_size 2 instead of 4" in text
    assert "accumulate" not in text
    text = explained(tmp_path / "building", Hungry(MemoryError(), where="configure_model"), MemoryError)
    assert "Out of memory on cpu outside of a batch, at step 0." in text
    assert "(3)" in text


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    guard = OutOfMemoryGuard()
    with pytest.raises(RuntimeError, match="shapes") as error:
        fit(tmp_path, guard, task=Hungry(RuntimeError("shapes differ")))
    assert guard.error is None
    assert not hasattr(error.value, "__notes__")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (ValueError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_kinds_of_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
