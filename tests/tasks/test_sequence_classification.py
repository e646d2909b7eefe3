import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lora_lightning import BitFit, DoRA, LoRA, Optim, SequenceClassification
from lora_lightning.errors import BackboneError, ConfigError
from tests.tasks.toys import trainer

NAMES = ["bad", "fair", "good"]


@pytest.fixture
def backbone(tmp_path):
    """A folder with a tiny BERT that has no classification head, as pretrained encoders come."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def batches(num=4, size=8, length=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        ids = torch.randint(3, 50, (size, length), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 3}


def loader():
    return DataLoader(list(batches()), batch_size=None)


def build(backbone, **settings):
    usual = {"method": LoRA(r=4, target_modules="all-linear"), "optim": Optim(lr=1e-2, schedule="constant")}
    return SequenceClassification(backbone, label_names=NAMES, **{**usual, **settings})


def test_only_adapters_and_the_head_train(backbone):
    task = build(backbone)
    task.configure_model()
    trainable = {n for n, p in task.adapted.named_parameters() if p.requires_grad}
    assert all("_lora_lightning" in name for name in trainable)
    assert "classifier" in task.report.hosts
    assert "bert.pooler.dense" in task.report.hosts


def test_a_model_built_before_its_trainer_is_sharded_by_it(backbone, monkeypatch):
    given = []
    monkeypatch.setattr("lora_lightning.tasks.base.shard_for_trainer", lambda *those: given.append(those[-1]))
    task = build(backbone)
    task.configure_model()
    built = task.adapted
    task._trainer = trainer()
    task.configure_model()
    assert given == [None, task._trainer]
    assert task.adapted is built


def test_dropout_is_on_while_training(backbone):
    task = build(backbone)
    task.configure_model()
    batch = next(batches())
    assert not torch.equal(task.compute_loss(batch).predictions, task.compute_loss(batch).predictions)
    task.eval()
    assert torch.equal(task.compute_loss(batch).predictions, task.compute_loss(batch).predictions)


def test_fit_then_test_from_the_checkpoint_gives_bit_identical_metrics(backbone, tmp_path):
    method = DoRA(r=3, alpha=7, target_modules=["key", "output.dense"], dropout=0.1)
    task = build(backbone, method=method)
    run = trainer(max_epochs=3)
    run.fit(task, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    expected = run.test(task, loader(), verbose=False)[0]
    torch.manual_seed(99)
    fresh = SequenceClassification(backbone, method=method, label_names=NAMES)
    untrained = trainer().test(fresh, loader(), verbose=False)[0]
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    again = trainer().test(loaded, loader(), verbose=False)[0]
    assert again == expected
    assert untrained["test/loss"] != expected["test/loss"]
    assert loaded.methods == (method,)
    assert loaded.label_names == NAMES


def test_metrics_are_accuracy_and_macro_f1(backbone):
    task = build(backbone)
    run = trainer()
    result = run.test(task, loader(), verbose=False)[0]
    task.eval()
    with torch.no_grad():
        logits = torch.cat([task(without_labels(batch)).logits for batch in batches()])
    labels = torch.cat([batch["labels"] for batch in batches()])
    guesses = logits.argmax(-1)
    assert result["test/accuracy"] == pytest.approx((guesses == labels).float().mean().item())
    f1 = []
    for k in range(3):
        hits = ((guesses == k) & (labels == k)).sum()
        f1.append((2 * hits / ((guesses == k).sum() + (labels == k).sum())).item())
    assert result["test/f1"] == pytest.approx(sum(f1) / 3)
    assert result["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_class_weights_go_by_name(backbone):
    task = build(backbone, class_weights={"good": 5.0})
    task.configure_model()
    task.eval()
    batch = next(batches())
    output = task.compute_loss(batch)
    weighted = F.cross_entropy(output.predictions, batch["labels"], weight=torch.tensor([1.0, 1.0, 5.0]))
    assert output.loss == weighted
    assert output.loss != F.cross_entropy(output.predictions, batch["labels"])


@pytest.mark.parametrize("weights", [{"great": 2.0}, {"good": -1.0}])
def test_wrong_class_weights_are_refused(backbone, weights):
    with pytest.raises(ConfigError, match="class_weights"):
        build(backbone, class_weights=weights).configure_model()


@pytest.mark.parametrize("names", [["only"], ["a", "a"], []])
def test_label_names_must_be_at_least_two_different_ones(backbone, names):
    with pytest.raises(ConfigError, match="label_names"):
        SequenceClassification(backbone, label_names=names)


def test_label_names_are_needed(backbone):
    with pytest.raises(ConfigError, match="needs label_names"):
        SequenceClassification(backbone).configure_model()


def test_label_names_stand_in_the_config_and_in_predictions(backbone):
    task = build(backbone)
    predictions = trainer().predict(task, loader())
    assert task.adapted.config.id2label == dict(enumerate(NAMES))
    first = predictions[0][0]
    assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)
    assert first["probabilities"].keys() == set(NAMES)
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_a_decoder_without_padding_token_pads_with_its_end_token(tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    task = build(str(tmp_path / "gpt2"))
    task.configure_model()
    assert task.adapted.config.pad_token_id == 2
    assert set(task.report.hosts) >= {"transformer.h.0.attn.c_attn", "score"}
    trainer(max_epochs=1).fit(task, loader())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_stay_float32_over_any_base(backbone, dtype):
    task = build(backbone, dtype=dtype)
    trainer(max_epochs=1).fit(task, loader())
    dtypes = {n: p.dtype for n, p in task.adapted.named_parameters()}
    assert {d for n, d in dtypes.items() if "_lora_lightning" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "_lora_lightning" not in n} == {getattr(torch, dtype)}


def test_gradient_checkpointing_gives_the_same_gradients(backbone):
    gradients = []
    for checkpointing in (False, True, "activations"):
        torch.manual_seed(4)
        task = build(backbone, gradient_checkpointing=checkpointing, method=LoRA(r=4, dropout=0.3))
        task.configure_model()
        flags = {getattr(m, "gradient_checkpointing", False) for m in task.adapted.modules()}
        assert (True in flags) is (checkpointing is True)
        recomputing = [m.recomputes_input for m in task.adapted.modules() if hasattr(m, "recomputes_input")]
        assert set(recomputing) == {checkpointing == "activations"}
        torch.manual_seed(6)
        task.compute_loss(next(batches())).loss.backward()
        gradients.append([p.grad for p in task.adapted.parameters() if p.grad is not None])
    for others in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[0], others, strict=True))


def test_only_low_rank_methods_recompute_activations(backbone):
    with pytest.raises(ConfigError, match="set gradient_checkpointing to true instead"):
        build(backbone, gradient_checkpointing="activations", method=BitFit()).configure_model()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./no/such/folder", "does not exist"),
        ("owner/no-such-model", "neither a folder here nor in the local Hub cache"),
    ],
)
def test_a_backbone_that_is_not_there_is_a_sentence(name, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BackboneError, match=words):
        build(name).configure_model()
