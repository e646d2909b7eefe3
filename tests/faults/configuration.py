"""Faults in configs and flags."""

from tests.faults.bench import FIT, OWN_MODEL, OWN_TOKENIZER, Fault, config, method, own_code, yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
RUNAWAY = "'([a-z0-9.]|[a-z0-9.]{2})+[A-Z]'"


FAULTS = [
    # Commands and flags.
    Fault("no command", r"^a command is needed: fit, validate, test", []),
    Fault("misspelt command", r"^unknown command `trian`; commands: ", ["trian"]),
    Fault("options before the command", r"^the command comes first, but got `--config`", ["--config", "good.yaml"]),
    Fault("misspelt flag", r"^unknown option `--ckpt_pth`; did you mean `--ckpt_path`\?", [*FIT, "--ckpt_pth", "x"]),
    Fault("abbreviated flag", r"^unknown option `--trainer\.max_ep`", [*FIT, "--trainer.max_ep", "1"]),
    Fault("stray word", r"^unexpected words: hello; settings are given as --name value", [*FIT, "hello"]),
    Fault("no model", r"^no model is given; name one under `model:`", ["fit"]),
    Fault("no data", r"^no data are given; name them under `data:`", ["fit", "--model", "SequenceClassification"]),
    # YAML.
    Fault(
        "missing config", r"^there is no config file 'god\.yaml'; nearest there: good\.yaml", ["fit", "-c", "god.yaml"]
    ),
    Fault("empty config", r"^bad\.yaml: expected a mapping .* got nothing", yaml("")),
    Fault("broken YAML", r"^bad\.yaml, line 2: not valid YAML", yaml("model: [\n")),
    Fault(
        "duplicate key",
        r"^bad\.yaml, line 2: the key `model` is there twice \(first in line 1\)",
        yaml("model: a\nmodel: b\n"),
    ),
    Fault(
        "python tag",
        r"^bad\.yaml, line 1: the tag `!!python/object/apply:os\.system` is not allowed",
        yaml("model: !!python/object/apply:os.system ['touch pwned']\n"),
    ),
    Fault("YAML bomb", r"^bad\.yaml, line \d+: more than 100,000 values once its aliases are written out", yaml(BOMB)),
    Fault("endless alias", r"^bad\.yaml, line 1: the alias `\*x` contains itself", yaml("model: &x [*x]\n")),
    Fault(
        "config in latin-1",
        r"^bad\.yaml: not a text file in UTF-8 \(byte 7\); save it as UTF-8",
        yaml("model: é".encode("latin-1")),
    ),
    Fault("config of 2 MiB", r"^bad\.yaml: a config file of more than 1 MiB is not read", yaml("#" * 2**21)),
    # Settings.
    Fault(
        "misspelt key",
        r"^bad\.yaml, line 5: unknown key `model\.init_args\.metod`; did you mean `method`\?",
        config("method:", "metod:"),
    ),
    Fault("PEFT's spelling", r"unknown key `.*\.lora_alpha`; use alpha", config("alpha: 4", "lora_alpha: 4")),
    Fault("wrong kind of value", r"^bad\.yaml, line 7: .*\.r: expected an int, got '8x'", config("r: 2", "r: 8x")),
    Fault("rank of zero", r"r must be an integer of at least 1, got 0", config("r: 2", "r: 0")),
    Fault(
        "dropout above one", r"dropout must be at least 0 and below 1, got 1\.5", config("r: 2", "r: 2, dropout: 1.5")
    ),
    Fault("negative rate", r"Optim: lr must be a finite number above 0, got -1", config("lr: 1e-2", "lr: -1")),
    Fault(
        "unknown optimizer", r"there is no optimizer 'AdamV'; did you mean Adam", config("lr: 1e-2", "optimizer: AdamV")
    ),
    Fault(
        "unknown method", r"unknown class `LoRRA` at `model\.init_args\.method`; did you mean `LoRA`\?", method("LoRRA")
    ),
    Fault(
        "method that is none",
        r"`torch\.nn\.Linear` is a class, but not a subclass of lora_lightning\.adapters\.Method",
        method("torch.nn.Linear"),
    ),
    Fault(
        "unknown task",
        r"unknown class `SequenceClasification` at `model`; did you mean `SequenceClassification`\?",
        [*FIT, "--model", "SequenceClasification"],
    ),
    Fault(
        "Delta-LoRA with dropout",
        r"DeltaLoRA: dropout must be 0, got 0\.1: .* Use LoRA for dropout",
        method("DeltaLoRA", "--model.method.dropout", "0.1"),
    ),
    Fault(
        "no virtual tokens",
        r"num_virtual_tokens must be .*at least 1, got 0",
        method("PromptTuning", "--model.method.num_virtual_tokens", "0"),
    ),
    Fault(
        "a callable that runs commands",
        r"^os\.system is not imported because a setting names it: it could run any command",
        [*FIT, "--trainer.callbacks", "{class_path: LambdaCallback, init_args: {on_fit_start: os.system}}"],
    ),
    Fault(
        "class outside strict mode's list",
        r"^`model\.init_args\.method` names evil\.Method, which strict mode does not allow",
        [*method("evil.Method"), "--strict"],
    ),
    # Which modules.
    Fault(
        "module that is not there",
        r"^target_modules: no module is called 'queri'\. Nearest names: query",
        config("[query, value]", "[queri]"),
    ),
    Fault(
        "malformed pattern",
        r"^target_modules: '\(query' is no valid regular expression",
        config("[query, value]", "'(query'"),
    ),
    Fault(
        "pattern that matches nothing",
        r"^target_modules: the regular expression '\.\*xyz' matches no whole module path",
        config("[query, value]", "'.*xyz'"),
    ),
    Fault(
        "pattern that runs away",
        r"^target_modules: the regular expression .* runs away",
        config("[query, value]", RUNAWAY),
    ),
    Fault("rank beyond the layer", r"r=64 is larger than .* allows: its weight is 32 x 32", config("r: 2", "r: 64")),
    # The backbone.
    Fault(
        "missing backbone",
        r"^The backbone folder '\./bose' does not exist; the nearest names there: base",
        config("backbone: base", "backbone: ./bose"),
    ),
    Fault(
        "backbone on the Hub, offline",
        r"^'acme/bert' is neither a folder here nor in the local Hub cache",
        config("backbone: base", "backbone: acme/bert"),
    ),
    Fault(
        "backbone without a model",
        r"^The folder 'run' holds no model: it has no config\.json",
        config("backbone: base", "backbone: run", "--data.tokenizer", "base"),
    ),
    Fault(
        "package path that leaves",
        r"leaves the package 'lora_lightning'",
        config("backbone: base", "backbone: pkg://lora_lightning/../../etc"),
    ),
    Fault(
        "backbone with code of its own",
        r"^AutoModelFor\w+ cannot load 'base': its files bring code",
        own_code(OWN_MODEL),
    ),
    Fault(
        "backbone with code of its own, planned for",
        r"^The config of 'base' cannot be read: its files bring code of their own .* never runs it\. Use a model",
        own_code(OWN_MODEL, ["plan", "--config", "good.yaml"]),
    ),
    Fault(
        "tokenizer with code of its own",
        r"^The tokenizer of 'base' cannot be loaded: its files bring code of their own",
        own_code(OWN_TOKENIZER),
    ),
    Fault(
        "unknown precision of the base",
        r"^dtype must be one of auto, float32, bfloat16, float16, got 'fp8'",
        [*FIT, "--model.dtype", "fp8"],
    ),
]
