"""Faults in checkpoints and adapter folders, and bases that are not those of the training."""

import pickle
import struct
from pathlib import Path

import torch

from lora_lightning.__main__ import main
from tests.faults.bench import (
    CKPT,
    FIT,
    MERGE,
    START,
    TEST,
    Fault,
    adapter_file,
    checkpoint,
    json_file,
    leave_alone,
    other_base,
    other_tokenizer,
    tensors,
    written_by,
)

RESUME = [*FIT, "--ckpt_path", CKPT]
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"


class Canary:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def as_checkpoint(content):
    """Put bytes, or what torch saves of an object, where the checkpoint was."""

    def provoke():
        leave_alone()
        if isinstance(content, bytes):
            Path(CKPT).write_bytes(content)
        else:
            torch.save(content, CKPT)
        return TEST

    return provoke


def pickled_checkpoint():
    leave_alone()
    torch.save({"state_dict": Canary(), "hyper_parameters": {}}, CKPT)
    return TEST


def requeued():
    """Put the canary where Lightning looks for the checkpoint of a job that was requeued."""
    content = torch.load(CKPT, weights_only=True)
    torch.save({**content, "canary": Canary()}, "runs/hpc_ckpt_1.ckpt")
    return [*FIT, "--ckpt_path", "hpc"]


def cut_short():
    content = Path(CKPT).read_bytes()
    Path(CKPT).write_bytes(content[: len(content) // 2])
    return TEST


def bit_flipped():
    content = bytearray(Path(CKPT).read_bytes())
    content[len(content) // 3] ^= 1
    Path(CKPT).write_bytes(content)
    return TEST


def traversal(content):
    content["files"]["../../pwned"] = content["files"].pop(WEIGHTS)


def setting(name, value):
    def change(content):
        content[name] = value

    return change


def weights_alone(content):
    for name in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        del content[name]


def hyperparameter(name, value):
    def change(content):
        content["hyper_parameters"][name] = value

    return change


def written_by_old(name):
    def change(content):
        del content["lora_lightning"]["task"]
        content["hyper_parameters"]["_class_path"] = name

    return change


def method_path(content):
    content["hyper_parameters"]["method"]["class_path"] = "evil.Method"


def flipped(state):
    swapped = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {
        name.replace(part, swapped[part]): tensor for name, tensor in state.items() for part in swapped if part in name
    } | {name: tensor for name, tensor in state.items() if "lora_" not in name}


def half_renamed(state):
    return {(name.replace("query", "querry") if "query" in name else name): tensor for name, tensor in state.items()}


def deeper_keys(state):
    return state | {
        name.replace("layer.1", "layer.7"): tensor.clone() for name, tensor in state.items() if "layer.1" in name
    }


def outside(state):
    return {name.replace("encoder.layer.1", "encoder/../../../pwned"): tensor for name, tensor in state.items()}


def with_nan(state):
    name = next(iter(state))
    state[name][0] = float("nan")
    return state


def half_of_checkpoint(content):
    state = content["state_dict"]
    for name in list(state)[::2]:
        state[name.replace("lora", "lara").replace("weight", "wait")] = state.pop(name)


def new_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


def deeper(model):
    import transformers

    model.config.num_hidden_layers = 3
    model.__init__(model.config)
    assert isinstance(model, transformers.BertModel)


def pickled_adapter():
    arguments = adapter_file(WEIGHTS, None)()
    Path("run/last/adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    return arguments


def exported():
    assert main(["export", *MERGE[1:]]) == 0
    return other_tokenizer([*START[:-1], "out"])()


def other_labels():
    text = Path("train.csv").read_text()
    Path("other.csv").write_text(text.replace("yes", "maybe"))
    return [*START, "--data.train", "other.csv"]


FAULTS = [
    # Checkpoints.
    Fault(
        "missing checkpoint",
        r"^There is no checkpoint run/lost\.ckpt; in its folder are .*last\.ckpt",
        [*TEST[:-1], "run/lost.ckpt"],
    ),
    Fault(
        "folder as checkpoint",
        r"^run/last is a folder; name the \.ckpt file that stands beside it",
        [*TEST[:-1], "run/last"],
    ),
    Fault("text as checkpoint", r"^run/last\.ckpt is not a checkpoint that can be read", as_checkpoint(b"hello")),
    Fault(
        "somebody else's checkpoint", r"^run/last\.ckpt holds no hyper_parameters", as_checkpoint({"state_dict": {}})
    ),
    Fault(
        "pickle canary",
        r"^run/last\.ckpt is not a checkpoint that can be read safely \(it holds more than numbers, texts and tensors",
        pickled_checkpoint,
    ),
    Fault(
        "bare pickle canary",
        r"^run/last\.ckpt is not a checkpoint that can be read safely",
        as_checkpoint(pickle.dumps(Canary())),
    ),
    Fault(
        "pickle canary, asked for",
        r"^weights_only is false, which would run any code that a checkpoint carries",
        lambda: [*pickled_checkpoint(), "--weights_only", "false"],
    ),
    Fault(
        "pickle canary of a requeued job",
        r"hpc_ckpt_1\.ckpt is not a checkpoint that can be read safely \(it holds more than numbers",
        requeued,
    ),
    Fault(
        "no requeued job", r"^--ckpt_path hpc: no requeued job left a hpc_ckpt_\*\.ckpt", [*FIT, "--ckpt_path", "hpc"]
    ),
    Fault(
        "best checkpoint of no run",
        r"^--ckpt_path best only works after fit in one process",
        [*FIT, "--ckpt_path", "best"],
    ),
    Fault(
        "checkpoint of a task that is not imported",
        r"written by the task evil\.Task, .* If you trust it, say so: --model evil\.Task",
        checkpoint(written_by("evil.Task"), ["test", "--ckpt_path", CKPT]),
    ),
    Fault(
        "checkpoint of version 0.1, of a task that is not imported",
        r"written by the task evil\.Task, .* If you trust it, say so: --model evil\.Task",
        checkpoint(written_by_old("evil.Task"), ["test", "--ckpt_path", CKPT]),
    ),
    Fault(
        "checkpoint of a method that is not imported",
        r"names the method evil\.Method, .* importing it runs its code",
        checkpoint(method_path),
    ),
    Fault(
        "checkpoint that names its builder",
        r"names a function to build its task with",
        checkpoint(hyperparameter("_instantiator", "os.system")),
    ),
    Fault(
        "half the keys of a checkpoint renamed",
        r"^The adapter's keys do not fit this model: of 10 expected, 5 are missing .* and 5 are unknown .*lara_A",
        checkpoint(half_of_checkpoint),
    ),
    Fault(
        "changed alpha",
        r"`model\.init_args\.method\.init_args\.alpha` is 8\.0 here, but the checkpoint .* was trained with 4\.0",
        [*TEST, "--model.method.alpha", "8"],
    ),
    Fault("changed rank", r"`model\.init_args\.method\.init_args\.r` is 4 here", [*TEST, "--model.method.r", "4"]),
    Fault(
        "checkpoint of weights alone",
        r"^The checkpoint holds no state of optimizer and loops .*model\.init_args\.adapter",
        checkpoint(weights_alone, RESUME),
    ),
    Fault(
        "checkpoint without its optimizer",
        r"^The checkpoint holds no state of optimizer and loops",
        checkpoint(setting("optimizer_states", []), RESUME),
    ),
    Fault("checkpoint without loops", r"^The checkpoint holds no state of", checkpoint(setting("loops", {}), RESUME)),
    Fault(
        "checkpoint without its place in the data",
        r"^The checkpoint was changed since it was written: its entry exact_resume lacks data_fingerprint, num_batches",
        checkpoint(setting("exact_resume", {}), RESUME),
    ),
    Fault(
        "checkpoint without the base's fingerprint",
        r"^This checkpoint was changed since it was written: its entry lora_lightning must hold the base_fingerprint",
        checkpoint(lambda content: content["lora_lightning"].pop("base_fingerprint")),
    ),
    Fault(
        "checkpoint of another number of methods",
        r"^This checkpoint was changed .* a method_state for each of 1 methods",
        checkpoint(lambda content: content["lora_lightning"].update(method_state=[])),
    ),
    Fault(
        "number in place of a tensor",
        r"^The checkpoint holds a int in 'classifier\.bias', where a tensor is expected",
        checkpoint(lambda content: content["state_dict"].update({"model.classifier.bias": 5})),
    ),
    Fault(
        "NaN in a checkpoint",
        r"^The checkpoint holds NaN or infinite values in 1 of 10 tensors, the first in 'classifier\.bias'",
        checkpoint(lambda content: content["state_dict"]["model.classifier.bias"].fill_(float("nan"))),
    ),
    # The base and the tokenizer.
    Fault(
        "wrong base of equal shape",
        r"^The checkpoint was trained on another base model: the base weights under its adapters have fingerprint",
        other_base(new_weights),
    ),
    Fault("deeper base", r"^The checkpoint was trained on another base model", other_base(deeper)),
    Fault(
        "wrong base under an adapter folder",
        r"^run/last was trained on another base model",
        other_base(new_weights, START),
    ),
    Fault(
        "another tokenizer",
        r"^The checkpoint was trained with another tokenizer: its vocabulary has fingerprint",
        other_tokenizer(TEST),
    ),
    Fault(
        "another tokenizer for a resumed run",
        r"^The checkpoint was trained with another tokenizer",
        other_tokenizer([*FIT, "--ckpt_path", CKPT]),
    ),
    Fault(
        "another tokenizer under an adapter folder",
        r"^run/last was trained with another tokenizer: its vocabulary has fingerprint",
        other_tokenizer(START),
    ),
    Fault("another tokenizer under an exported adapter", r"^out was trained with another tokenizer", exported),
    Fault("missing adapter", r"^lost is not a directory", [*START[:-1], "lost"]),
    Fault("checkpoint as adapter", r"is a file; name the folder that stands beside a \.ckpt file", [*START[:-1], CKPT]),
    Fault(
        "changed alpha in an adapter folder",
        r"^run/last/adapter_config\.json has \d+ bytes, its manifest says \d+: it was cut short or changed",
        json_file(CONFIG, setting("lora_alpha", 8), keep_manifest=True),
    ),
    Fault(
        "another alpha than the adapter's",
        r"run/last was trained with alpha=4\.0, and the model has alpha=8\.0",
        [*FIT, "--model.adapter", "run/last", "--model.method.alpha", "8"],
    ),
    Fault(
        "empty weights, manifest mended",
        r"is not a readable safetensors file",
        adapter_file(WEIGHTS, b"", with_manifest=True),
    ),
    Fault(
        "path traversal in a manifest", r"files must be an object of plain file names", json_file(MANIFEST, traversal)
    ),
    Fault(
        "path traversal in the name of an adapter's host",
        r"^The adapter's tensors do not fit its config .* not targets here .*\.\./pwned",
        tensors(outside),
    ),
    Fault(
        "manifest of a later version",
        r"has format version 99, and this library reads 1",
        json_file(MANIFEST, setting("format_version", 99)),
    ),
    Fault("manifest that is no JSON", r"manifest\.json is not valid JSON", adapter_file(MANIFEST, b"{")),
    Fault(
        "NaN in an adapter", r"holds NaN or infinite values in 1 of \d+ tensors", tensors(with_nan, with_manifest=True)
    ),
    Fault(
        "other labels than the head's",
        r"holds a head for the labels no, yes, and this run has",
        other_labels,
    ),
    # Adapters of strangers.
    Fault(
        "flipped adapter",
        r"^run/last: 8 of 10 adapter tensors have another shape .*lora_A \[32, 2\] instead of \[2, 32\]",
        tensors(flipped),
    ),
    Fault(
        "half the keys of an adapter renamed",
        r"^The adapter's tensors do not fit its config .* 2 have no tensors .* 2 modules with .* not targets .*querry",
        tensors(half_renamed),
    ),
    Fault(
        "adapter of a deeper base",
        r"^The adapter's tensors do not fit its config .* 2 modules with tensors are not targets here .*layer\.7",
        tensors(deeper_keys),
    ),
    Fault(
        "empty safetensors",
        r"^run/last/adapter_model\.safetensors is not a readable safetensors file .*header too small",
        adapter_file(WEIGHTS, b""),
    ),
    Fault(
        "huge header in safetensors",
        r"^run/last/adapter_model\.safetensors is not a readable safetensors file \(its header claims \d+ bytes",
        adapter_file(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    ),
    Fault(
        "checkpoint cut short",
        r"run/last\.ckpt has \d+ bytes, its manifest says \d+: it was cut short or changed\. The newest complete one",
        cut_short,
    ),
    Fault("one bit of a checkpoint flipped", r"run/last\.ckpt differs from what was written", bit_flipped),
    Fault("no weights", r"holds no adapter_model\.safetensors", adapter_file(WEIGHTS, None)),
    Fault("adapter in a pickle", r"a pickle, which could run code when it is read", pickled_adapter),
    Fault("adapter of another kind", r"peft_type is 'OFT'", json_file(CONFIG, setting("peft_type", "OFT"))),
    Fault(
        "option that is not computed", r"layer_replication=", json_file(CONFIG, setting("layer_replication", [[0, 1]]))
    ),
    Fault("adapter's config that is no JSON", r"adapter_config\.json is not valid JSON", adapter_file(CONFIG, b"{")),
    Fault(
        "adapter's rank that is none", r"r must be a whole number from 1, got -3", json_file(CONFIG, setting("r", -3))
    ),
    Fault(
        "adapter's pattern that runs away",
        r"runs away",
        json_file(CONFIG, setting("target_modules", "([a-z0-9.]|[a-z0-9.]{2})+[A-Z]")),
    ),
]
