"""The main job from end to end: fit, test, compare with the frozen model, check the merged folder, write a summary."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.callbacks import Callback, Timer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lora_lightning.backbones.load import locate
from lora_lightning.callbacks import AdapterCheckpoint, MergeAtEnd
from lora_lightning.cli import AdapterCLI, run_lightning

CONFIG = "config://quickstart.yaml"
SUMMARY = Path("runs/quickstart/summary.json")
MAX_LOGIT_DIFFERENCE = 1e-5
console = Console()


def main(arguments: list[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning calls a function that torch deprecates
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    console.rule("1. Train: lora-lightning fit --config " + CONFIG)
    cli = run_lightning("fit", ["--config", CONFIG, *arguments])
    checkpoint = find(cli, AdapterCheckpoint).best_model_path or find(cli, AdapterCheckpoint).last_model_path
    merged_dir = find(cli, MergeAtEnd).merged_dir
    train_seconds = find(cli, Timer).time_elapsed("train")  # now: loading a checkpoint adds its time on top

    console.rule("2. Test the best checkpoint")
    result = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)[0]
    console.print(f"test accuracy {result['test/accuracy']:.4f}, macro-F1 {result['test/f1']:.4f}")

    console.rule("3. Compare: the frozen model with logistic regression on its mean-pooled features")
    frozen = frozen_accuracy(cli)
    console.print(f"test accuracy {frozen:.4f}")

    console.rule("4. Check the merged folder with plain transformers")
    num_right, num_all, difference = check_merged(cli, Path(merged_dir))
    merged_accuracy = num_right / num_all
    console.print(f"test accuracy {merged_accuracy:.4f}, largest difference of a logit {difference:.1e}")

    adapter_dir = Path(checkpoint).with_suffix("")
    base_bytes = sum(p.numel() * p.element_size() for p in base_parameters(cli.model.adapted))
    summary = {
        "test_accuracy": result["test/accuracy"],
        "test_f1": result["test/f1"],
        "frozen_accuracy": frozen,
        "merged_accuracy": merged_accuracy,
        "merged_logit_difference": difference,
        "trained_share": cli.model.report.trainable_share,
        "adapter_bytes": folder_bytes(adapter_dir),
        "checkpoint_bytes": Path(checkpoint).stat().st_size,
        "base_bytes": base_bytes,
        "train_seconds": round(train_seconds, 1),
        "validation_accuracy": float(cli.trainer.checkpoint_callback.best_model_score or float("nan")),
        "checkpoint": checkpoint,
        "adapter_dir": str(adapter_dir),
        "merged_dir": str(merged_dir),
    }
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.rule("Done")
    show(summary)
    if difference <= MAX_LOGIT_DIFFERENCE and is_share(result["test/accuracy"], num_right, num_all):
        return 0
    print("quickstart: the merged model does not answer as the adapted one did; see above.", file=sys.stderr)
    return 1


def find(cli: AdapterCLI, kind: type[Callback]) -> Any:  # noqa: ANN401 - an instance of `kind`
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, kind))


def base_parameters(model: torch.nn.Module) -> Iterable[Tensor]:
    """Yield the base model's own parameters."""
    return (parameter for name, parameter in model.named_parameters() if "_lora_lightning" not in name)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@torch.inference_mode()
def frozen_accuracy(cli: AdapterCLI) -> float:
    """Fit logistic regression on the frozen encoder's features; its strength is chosen on the validation split."""
    from sklearn.linear_model import LogisticRegression

    encoder = transformers.AutoModel.from_pretrained(locate(cli.model.backbone)).eval()

    def features(batches: Iterable[dict[str, Tensor]]) -> tuple[Any, Any]:
        rows, labels = [], []
        for batch in batches:
            labels.append(batch.pop("labels"))
            mask = batch["attention_mask"].unsqueeze(-1)
            rows.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(rows).numpy(), torch.cat(labels).numpy()

    data = cli.datamodule
    train, val, test = (features(f()) for f in (data.train_dataloader, data.val_dataloader, data.test_dataloader))
    models = [LogisticRegression(C=strength, max_iter=2000).fit(*train) for strength in (0.1, 1, 10)]
    return float(max(models, key=lambda model: model.score(*val)).score(*test))


def is_share(accuracy: float, num_right: int, num_all: int) -> bool:
    """Tell whether an accuracy, which metrics compute in float32, is that of so many right answers."""
    return round(accuracy * num_all) == num_right


@torch.inference_mode()
def check_merged(cli: AdapterCLI, merged_dir: Path) -> tuple[int, int, float]:
    """Return how many test rows the merged folder gets right, of how many, and the largest distance of its logits."""
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(merged_dir).eval()
    adapted = cli.model.adapted.cpu().eval()
    num_right, num_all, difference = 0, 0, 0.0
    for batch in cli.datamodule.test_dataloader():
        labels = batch.pop("labels")
        logits = merged(**batch).logits
        difference = max(difference, float((logits - adapted(**batch).logits).abs().max()))
        num_right += int((logits.argmax(-1) == labels).sum())
        num_all += len(labels)
    return num_right, num_all, difference


def show(summary: dict[str, Any]) -> None:
    """Print the summary, and what to try next."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("test_accuracy", "frozen_accuracy", "merged_accuracy"):
        table.add_row(name.replace("_", " "), f"{summary[name]:.4f}")
    table.add_row("trained share of all parameters", f"{summary['trained_share']:.2%}")
    table.add_row(
        "adapter folder",
        f"{summary['adapter_dir']} ({summary['adapter_bytes'] / 1e6:.2f} MB, "
        f"{summary['adapter_bytes'] / summary['base_bytes']:.2%} of the base's {summary['base_bytes'] / 1e6:.1f} MB)",
    )
    table.add_row("checkpoint to resume from", f"{summary['checkpoint']} ({summary['checkpoint_bytes'] / 1e6:.2f} MB)")
    table.add_row("merged model", summary["merged_dir"])
    table.add_row("training", f"{summary['train_seconds']:.0f} s")
    table.add_row("all figures", str(SUMMARY))
    console.print(table)
    console.print(
        "Next:\n"
        f"  .venv/bin/lora-lightning test --config {CONFIG} --ckpt_path {summary['checkpoint']}\n"
        f"  .venv/bin/lora-lightning merge --ckpt_path {summary['checkpoint']} --output_dir my-model\n"
        "  .venv/bin/lora-lightning fit --config config://dora_classification.yaml\n"
        f"  .venv/bin/lora-lightning fit --config {CONFIG} --model.method.r 16 --model.optim.lora_plus_ratio 8",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
