"""Whatever instant a process is killed at, the old checkpoint or the new one is there, whole; damage is noticed."""

from __future__ import annotations

import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lightning.adapters import adapter_state_dict, attach
from lora_lightning.checkpoint import RunFacts, read_adapter_folder
from lora_lightning.checkpoint.complete import check_checkpoint, is_complete, newest_complete, recover
from lora_lightning.checkpoint.files import atomic_folder, hidden_entries, remove, writing_in
from lora_lightning.checkpoint.folder import fill_adapter_folder
from lora_lightning.checkpoint.manifest import MANIFEST_NAME
from lora_lightning.checkpoint.pair import folder_of, remove_pair, replace_link, write_pair
from lora_lightning.checkpoint.reading import read_file
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from lora_lightning.texts.model_card import CARD_NAME
from tests.checkpoint.runs import read_content
from tests.killing import kill_before_change

NUM_FLIPS, NUM_CUTS = 200, 20


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, LoRA(r=2, target_modules=["0"]))
    return model


@pytest.fixture
def write(model: nn.Module) -> Callable[[Path, int], Path]:
    """Return a function that writes the checkpoint of a step, with and in the same values as its number."""

    @torch.no_grad()
    def write(path: Path, step: int) -> Path:
        for tensor in adapter_state_dict(model).values():
            tensor.fill_(step)
        state = {f"model.{name}": tensor.clone() for name, tensor in adapter_state_dict(model).items()}
        checkpoint = {"state_dict": state, "hyper_parameters": {}, "global_step": step}
        write_pair(
            path,
            checkpoint,
            lambda folder, record: fill_adapter_folder(folder, model, RunFacts(step=step), checkpoint=record),
        )
        return path

    return write


def step_of(path: Path) -> int:
    """Load a checkpoint and, where it has one, its adapter folder; both must be of one step."""
    checkpoint = read_content(path)
    assert {value for tensor in checkpoint["state_dict"].values() for value in tensor.unique().tolist()} == {
        checkpoint["global_step"]
    }
    return int(checkpoint["global_step"])


def assert_tidy(folder: Path, steps: dict[str, int]) -> None:
    """These checkpoints are there, each complete with the folder of its step, and nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*steps, *(f"{name}.ckpt" for name in steps)])
    for name, step in steps.items():
        assert is_complete(folder / f"{name}.ckpt")
        assert step_of(folder / f"{name}.ckpt") == step
        manifest, state = read_adapter_folder(folder / name)
        assert (manifest.step, next(iter(state.values())).unique().item()) == (step, step)


@pytest.mark.parametrize("start", ["pair", "link", "nothing"])
def test_killed_at_any_change_while_saving(tmp_path: Path, write: Callable[[Path, int], Path], start: str) -> None:
    number, found = 0, []
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "last.ckpt"
        other = write(folder / "step=1.ckpt", 1)
        if start == "pair":
            write(path, 1)
        if start == "link":
            replace_link(other, path)
            replace_link(folder_of(other), folder_of(path))
        was_killed = kill_before_change(number, lambda path=path: write(path, 2))
        newest = newest_complete(folder)
        assert newest is not None
        if start != "nothing":
            step_of(path)  # `last` loads even before anything was tidied up
        recover(folder)
        expected = {"step=1": 1}
        if path.exists():
            expected["last"] = step_of(path)
            found.append(expected["last"])
        assert_tidy(folder, expected)
        assert step_of(newest) == max(expected.values())
        if not was_killed:
            break
        number += 1
    assert number > 8
    assert found[-1] == 2
    assert set(found) == ({2} if start == "nothing" else {1, 2})  # both sides of the instant were met


def test_killed_at_any_change_while_removing(tmp_path: Path, write: Callable[[Path, int], Path]) -> None:
    number = 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(folder / "step=1.ckpt", 1)
        write(folder / "last.ckpt", 2)
        was_killed = kill_before_change(number, lambda path=path: remove_pair(path, path.unlink))
        recover(folder)
        assert_tidy(folder, {"last": 2, "step=1": 1} if path.exists() else {"last": 2})
        if not was_killed:
            break
        number += 1
    assert number >= 3
    assert not path.exists()


def test_killed_while_a_link_moves(tmp_path: Path, write: Callable[[Path, int], Path]) -> None:
    number = 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        old, new, last = write(folder / "step=1.ckpt", 1), write(folder / "step=2.ckpt", 2), folder / "last.ckpt"

        def link(target: Path, last: Path = last) -> None:
            replace_link(target, last)
            replace_link(folder_of(target), folder_of(last))

        link(old)
        was_killed = kill_before_change(number, lambda link=link, new=new: link(new))
        step = step_of(last)
        recover(folder)
        assert_tidy(folder, {"last": step, "step=1": 1, "step=2": 2})
        if not was_killed:
            break
        number += 1
    assert number >= 4
    assert step == 2


def test_killed_while_a_folder_is_replaced(tmp_path: Path) -> None:
    def fill(text: str) -> None:
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "a").write_text(text)
            (temporary / "b").write_text(text)

    fill("old")
    number, texts = 0, []
    while kill_before_change(number, lambda: fill("new")):
        fill("old")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        texts.append({path.read_text() for path in (tmp_path / "folder").iterdir()})
        number += 1
    assert number > 5
    assert texts == [{"old"}] * number


def test_what_another_process_is_writing_stays(tmp_path: Path, write: Callable[[Path, int], Path]) -> None:
    write(tmp_path / "last.ckpt", 1)
    mine = tmp_path / ".last.ckpt.01234567.tmp"
    mine.write_text("half")
    with writing_in(tmp_path):
        recover(tmp_path)
        assert mine.exists()
    recover(tmp_path)
    assert_tidy(tmp_path, {"last": 1})
    recover(tmp_path / "absent")


def test_a_checkpoint_without_an_adapter_takes_the_older_folder_away(
    tmp_path: Path, write: Callable[[Path, int], Path]
) -> None:
    path = write(tmp_path / "last.ckpt", 1)
    write_pair(path, {"global_step": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert check_checkpoint(path) is None
    assert read_file(path).content == {"global_step": 2}


# Damage.


@pytest.fixture
def two(tmp_path: Path, write: Callable[[Path, int], Path]) -> tuple[Path, Path]:
    """An older checkpoint, and `last`."""
    return write(tmp_path / "step=1.ckpt", 1), write(tmp_path / "last.ckpt", 2)


def assert_refused(last: Path, older: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_content(last)
    assert str(last.parent / "last") in str(caught.value)
    assert f"The newest complete one beside it is {older} (step 1)." in str(caught.value)
    assert newest_complete(last.parent) == older
    assert step_of(older) == 1


def test_cut_at_random_offsets(two: tuple[Path, Path]) -> None:
    older, last = two
    whole, generator = last.read_bytes(), random.Random(0)
    for _ in range(NUM_CUTS):
        last.write_bytes(whole[: generator.randrange(len(whole))])
        assert_refused(last, older)
    last.write_bytes(whole)
    assert newest_complete(last.parent) == last
    assert step_of(last) == 2


def test_random_bit_flips(two: tuple[Path, Path]) -> None:
    older, last = two
    files = [last, *(path for path in folder_of(last).iterdir() if path.name != CARD_NAME)]  # which may be edited
    assert len(files) == 5
    generator = random.Random(0)
    for number in range(NUM_FLIPS):
        path = files[number % len(files)]
        whole = path.read_bytes()
        flipped, bit = bytearray(whole), generator.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if path in (last, folder_of(last) / MANIFEST_NAME):
            assert_refused(last, older)
        if path != last:
            with pytest.raises(CheckpointError, match=str(folder_of(last))):
                read_adapter_folder(folder_of(last))
        assert newest_complete(last.parent) == older
        path.write_bytes(whole)
        assert newest_complete(last.parent) == last  # negative control: the flip alone was the reason


def test_an_unpacked_size_is_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(100_000)}}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    assert read_file(path).content["state_dict"]["x"].numel() == 100_000
    path.write_bytes((tmp_path / "packed").read_bytes())
    with pytest.raises(CheckpointError, match="it is packed, which torch never does"):
        read_file(path)


def test_nothing_complete_is_said_too(tmp_path: Path, write: Callable[[Path, int], Path]) -> None:
    path = write(tmp_path / "last.ckpt", 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cut short or changed\. There is no complete one beside it"):
        read_content(path)
    remove(folder_of(path))
    with pytest.raises(CheckpointError, match=r"is damaged or of another kind\. There is no complete one beside it"):
        read_content(path)
    shutil.rmtree(tmp_path)
    assert newest_complete(tmp_path) is None


def test_hidden_names(tmp_path: Path) -> None:
    for name in (".a.01234567.tmp", ".b.ckpt.89abcdef.old", ".notes.tmp", "a.01234567.tmp", ".c.0123456.tmp"):
        (tmp_path / name).write_text("")
    assert sorted(hidden_entries(tmp_path).values()) == ["a", "b.ckpt"]
