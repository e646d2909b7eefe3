"""A byte-level tokenizer with a few merges, and files of conversations."""

import json

TEXT = "the answer is yes and the question is no. User: Assistant: hello world\n" * 20
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(folder, *, special=("pad", "eos"), begins=False, template=None, config=None, alphabet=True):
    """Save a tokenizer and a config in a folder; `special` names the tokens that it declares."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    named = {f"{name}_token": f"<{name}>" for name in special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return str(folder)


def llama_config(**changes):
    return {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 512, "eos_token_id": 2, **changes}


def turns(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(one) + "\n" if isinstance(one, dict) else f"{one}\n" for one in records))
    return str(path)


def learnt(tokenizer, ids, labels):
    """The text that is learnt, run by run."""
    runs, last = [], False
    for token, label in zip(list(ids), list(labels), strict=True):
        if label != -100:
            assert token == label
            runs = [*runs[:-1], [*runs[-1], int(token)]] if last else [*runs, [int(token)]]
        last = bool(label != -100)
    return [tokenizer.decode(run) for run in runs]
