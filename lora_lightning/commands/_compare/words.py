"""What no trial measures: the principle of each method, what it suits, and how hard it is to use."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lightning.commands._compare.ends import FROZEN, FULL


@dataclass(frozen=True)
class Words:
    """Three columns of a method.

    Args:
        principle: What it changes.
        suits: Where it is at home.
        difficulty: How hard it is to set up.
    """

    principle: str = "-"
    suits: str = "-"
    difficulty: str = "-"


WORDS = {
    FROZEN: Words("only the head learns", "features that fit already; a lower bound", "none"),
    FULL: Words("every weight learns", "much data and memory; an upper bound", "low rates, full checkpoints"),
    "LoRA": Words("low-rank update beside each weight", "the usual first choice", "easy: rank and rate"),
    "LoRA+": Words("LoRA whose B learns faster than A", "LoRA that learns too slowly", "easy: one ratio more"),
    "DoRA": Words(
        "LoRA on the direction, a magnitude apart", "low ranks; closer to full fine-tuning", "easy; slower steps"
    ),
    "AdaLoRA": Words("ranks dealt out by importance", "uneven layers, a tight budget", "moderate: a schedule"),
    "VeRA": Words("shared random factors, trained scales", "very many adapters of one base", "easy; high rates"),
    "LoRAFA": Words("LoRA with A frozen", "little memory for activations", "easy"),
    "DeltaLoRA": Words(
        "the weight follows LoRA's changes", "more capacity at LoRA's memory", "moderate: start and strength"
    ),
    "LoRADrop": Words(
        "LoRA only where its output is large", "many layers, few of them needed", "moderate: calibration"
    ),
    "IA3": Words("scales keys, values and FFN inputs", "few examples, fewest parameters", "easy; high rates"),
    "BottleneckAdapter": Words("small networks after sub-layers", "many tasks, modular reuse", "easy; slows inference"),
    "BitFit": Words("only biases learn", "small data on encoders", "easy; needs biases"),
    "PromptTuning": Words(
        "trained embeddings before the input", "large models, many tasks in a batch", "hard to train small models"
    ),
    "PTuning": Words("the same, out of a small encoder", "understanding with frozen models", "moderate: an encoder"),
    "PrefixTuning": Words("trained keys and values in every layer", "generation", "moderate: reparameterised"),
    "PTuningV2": Words(
        "deep prompts without an encoder", "understanding, sequence labelling", "moderate: length and rate"
    ),
    "TrainableTokens": Words("chosen rows of the embeddings", "tokens that were added", "easy: name the tokens"),
}
"""By the name of the method's class, LoRA+, or the end."""


def words_of(name: str) -> Words:
    """Return what is said about a method; hyphens for one that is not known here.

    Example:
        >>> words_of("NobodysMethod").suits
        '-'
    """
    return WORDS.get(name, Words())
