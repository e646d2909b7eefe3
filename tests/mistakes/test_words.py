"""Names of other tools, and settings in the wrong section, are answered with the right ones."""

from pathlib import Path

import pytest

from tests.faults.bench import CONFIG, FIT
from tests.mistakes.lines import fit, mistake

FLAGS = [
    ("--lr 1e-3", "--model.optim.lr"),
    ("--optim.lr 1e-3", "--model.optim.lr"),
    ("--learning_rate 1e-3", "--model.optim.lr"),
    ("--learning-rate 1e-3", "--model.optim.lr"),
    ("--trainer.learning_rate 1e-3", "--model.optim.lr"),
    ("--optim.warmup_steps 10", "--model.optim.warmup"),
    ("--weight_decay 0.1", "--model.optim.weight_decay"),
    ("--lr_scheduler_type cosine", "--model.optim.schedule"),
    ("--epochs 3", "--trainer.max_epochs"),
    ("--num_train_epochs 3", "--trainer.max_epochs"),
    ("--max_epochs 3", "--trainer.max_epochs"),
    ("--max_steps 3", "--trainer.max_steps"),
    ("--batch_size 8", "--data.batch_size"),
    ("--per_device_train_batch_size 8", "--data.batch_size"),
    ("--per_device_eval_batch_size 8", "--data.eval_batch_size"),
    ("--gradient_accumulation_steps 4", "--trainer.accumulate_grad_batches"),
    ("--max_grad_norm 1.0", "--trainer.gradient_clip_val"),
    ("--max_seq_length 128", "--data.max_length"),
    ("--max_length 128", "--data.max_length"),
    ("--train_file a.csv", "--data.train"),
    ("--train a.csv", "--data.train"),
    ("--model_name_or_path base", "--model.backbone"),
    ("--backbone base", "--model.backbone"),
    ("--lora_r 8", "--model.method.r"),
    ("--r 8", "--model.method.r"),
    ("--method.r 8", "--model.method.r"),
    ("--lora_alpha 16", "--model.method.alpha"),
    ("--lora_dropout 0.1", "--model.method.dropout"),
    ("--target_modules all-linear", "--model.method.target_modules"),
    ("--use_dora true", "--model.method DoRA"),
    ("--use_rslora true", "--model.method.scaling rslora"),
    ("--load_in_4bit true", "--model.quantization.bits 4"),
    ("--gradient_checkpointing true", "--model.gradient_checkpointing"),
    ("--seed 3", "--seed_everything"),
    ("--fp16 true", "--trainer.precision 16-mixed"),
    ("--bf16 true", "--trainer.precision bf16-mixed"),
    ("--precision 16-mixed", "--trainer.precision"),
    ("--devices 2", "--trainer.devices"),
    ("--gpus 2", "--trainer.devices"),
    ("--strategy ddp", "--trainer.strategy"),
    ("--output_dir out", "--trainer.default_root_dir"),
    ("--logging_steps 10", "--trainer.log_every_n_steps"),
    ("--eval_steps 10", "--trainer.val_check_interval"),
    ("--report_to wandb", "--trainer.logger"),
    ("--resume_from_checkpoint run/last.ckpt", "--ckpt_path"),
    ("--checkpoint run/last.ckpt", "--ckpt_path"),
    ("--save_total_limit 3", "AdapterCheckpoint under trainer.callbacks, with save_top_k"),
    ("--early_stopping_patience 3", "EarlyStopping under trainer.callbacks, with patience"),
]


@pytest.mark.parametrize(("flag", "right"), FLAGS, ids=[flag for flag, _ in FLAGS])
def test_a_flag_of_another_tool(here, capsys, flag, right):
    error = mistake(capsys, *fit(*flag.split()))
    name = flag.split()[0]
    answer = f"use `{right}`" if right.startswith("--") else f"use {right}"
    assert error in (f"unknown option `{name}`; {answer}", f"unknown key `{name[2:]}`; {answer.replace('`--', '`')}")


KEYS = [
    ("seed: 3\n", "seed", "seed_everything"),
    ("learning_rate: 1e-3\n", "learning_rate", "model.optim.lr"),
    ("trainer: {learning_rate: 1e-3}\n", "trainer.learning_rate", "model.optim.lr"),
    ("trainer: {batch_size: 4}\n", "trainer.batch_size", "data.batch_size"),
    ("model: {init_args: {lr: 1e-3}}\n", "model.init_args.lr", "model.optim.lr"),
    ("model: {init_args: {optim: {learning_rate: 1}}}\n", "model.init_args.optim.learning_rate", "model.optim.lr"),
    ("model: {init_args: {r: 4}}\n", "model.init_args.r", "model.method.r"),
    ("model: {init_args: {batch_size: 4}}\n", "model.init_args.batch_size", "data.batch_size"),
    ("data: {init_args: {lr: 4}}\n", "data.init_args.lr", "model.optim.lr"),
    ("data: {init_args: {max_seq_length: 4}}\n", "data.init_args.max_seq_length", "data.max_length"),
    ("trainer: {fp16: true}\n", "trainer.fp16", "trainer.precision: 16-mixed"),
    ("max_epochs: 3\n", "max_epochs", "trainer.max_epochs"),
]


@pytest.mark.parametrize(("text", "written", "right"), KEYS, ids=[written for _, written, _ in KEYS])
def test_a_key_of_another_tool(here, capsys, text, written, right):
    Path("more.yaml").write_text(text)
    error = mistake(capsys, *fit("--config", "more.yaml"))
    assert error == f"more.yaml, line 1: unknown key `{written}`; use `{right}`"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train"], "unknown command `train`; use `fit`"),
        (["finetune"], "unknown command `finetune`; use `fit`"),
        (["evaluate"], "unknown command `evaluate`; use `validate`"),
        (["inference"], "unknown command `inference`; use `predict`"),
        (["mrge"], "unknown command `mrge`; did you mean `merge`?"),
        (["fit", "ok.yaml"], "unexpected words: ok.yaml; did you mean --config ok.yaml?"),
        (["plan", "ok.yaml"], "unexpected words: ok.yaml; did you mean --config ok.yaml?"),
        (["merge", "--checkpoint", "a"], "unknown option `--checkpoint`; use `--ckpt_path`"),
        (["merge", "--output", "a"], "unknown option `--output`; use `--output_dir`"),
        (["plan", "--gpus", "A100"], "unknown option `--gpus`; use `--gpu`"),
        (["generate", "--max_tokens", "8"], "unknown option `--max_tokens`; use `--max_new_tokens`"),
    ],
    ids=" ".join,
)
def test_commands_and_their_words(here, capsys, words, answer):
    assert mistake(capsys, *words) == answer


VALUES = [
    ("--trainer.precision", "fp16", "16-mixed"),
    ("--trainer.precision", "bfloat16", "bf16-mixed"),
    ("--trainer.precision", "float32", "32-true"),
    ("--trainer.precision", "16-mix", "16-mixed"),
    ("--model.optim.schedule", "cosine_with_restarts", "cosine"),
    ("--model.optim.schedule", "cosin", "cosine"),
    ("--model.problem", "multi_label_classification", "multi_label"),
]


@pytest.mark.parametrize(("flag", "value", "right"), VALUES, ids=[value for _, value, _ in VALUES])
def test_values_of_another_tool(here, capsys, flag, value, right):
    assert f"{value!r} is not a value of it; did you mean `{right}`?" in mistake(capsys, *fit(flag, value))


@pytest.mark.parametrize("flag", ["--model.optim.lr=1e-3", "--data.batch_size=4", "--trainer.precision=32-true"])
def test_what_the_answers_name_is_there(here, capsys, flag):
    error = mistake(capsys, *fit(flag, "--trainer.max_epoch", "3"))
    assert error == "unknown option `--trainer.max_epoch`; did you mean `--trainer.max_epochs`?"


@pytest.mark.parametrize("amount", ["24", "24B", "24K", "0.5"])
def test_a_gpu_without_its_unit(here, capsys, amount):
    number = amount.rstrip("BKM")
    assert f"did you mean {number}GB?" in mistake(capsys, "plan", *FIT[1:], "--length", "16", "--gpu", amount)


EMPTY = [
    ("modle: {}\n", "unknown key `modle`; did you mean `model`?"),
    ("modle:\n", "unknown key `modle`; did you mean `model`?"),
    ("callbacks: []\n", "unknown key `callbacks`; use `trainer.callbacks`"),
    ("trainer: {max_epoch: {}}\n", "unknown key `trainer.max_epoch`; did you mean `max_epochs`?"),
    ("trainer: {max_epoch: null}\n", "unknown key `trainer.max_epoch`; did you mean `max_epochs`?"),
    ("model: {init_args: {metod: {}}}\n", "unknown key `model.init_args.metod`; did you mean `method`?"),
    ("model: {init_args: {optim: {lrr: {}}}}\n", "unknown key `model.init_args.optim.lrr`; did you mean `lr`?"),
    ("data: {init_args: {tain: {}}}\n", "unknown key `data.init_args.tain`; did you mean `train`?"),
    ("guards: {signal: {}}\n", "unknown key `guards.signal`; did you mean `signals`?"),
]


@pytest.mark.parametrize(("text", "words"), EMPTY, ids=[text.strip() for text, _ in EMPTY])
def test_a_misspelt_key_without_a_value(here, capsys, text, words):
    Path("more.yaml").write_text(text)
    assert mistake(capsys, *fit("--config", "more.yaml")) == f"more.yaml, line 1: {words}"


def test_a_misspelt_key_without_a_value_of_another_command(here, capsys):
    Path("more.yaml").write_text("ckpt_pth: {}\n")
    error = mistake(capsys, "merge", "--config", "more.yaml", "--ckpt_path=run/last.ckpt", "--output_dir=out")
    assert error == "more.yaml, line 1: unknown key `ckpt_pth`; did you mean `ckpt_path`?"


def test_keys_without_a_value_that_are_right_pass(here, capsys):
    Path("more.yaml").write_text(CONFIG + "  logger:\n  callbacks: []\nckpt_path:\nguards: {}\n")
    assert "unknown option `--x`" in mistake(capsys, "fit", "--config", "more.yaml", "--x", "1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer:\n\tmax_epochs: 3\n", "more.yaml, line 2: not valid YAML"),
        (None, "more.yaml: cannot be read"),
    ],
)
def test_tabs_and_folders(here, capsys, text, words):
    Path("more.yaml").mkdir() if text is None else Path("more.yaml").write_text(text)
    assert words in mistake(capsys, *fit("--config", "more.yaml"))
