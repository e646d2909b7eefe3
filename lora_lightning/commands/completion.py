"""The command `lora-lightning completion`."""

from __future__ import annotations

from typing import Literal

from lora_lightning.commands._completion.scripts import SHELLS
from lora_lightning.errors import ConfigError


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print the completion script of a shell, for commands, settings, classes and files.

    bash: add `eval "$(lora-lightning completion bash)"` to ~/.bashrc; zsh: the same with zsh, in ~/.zshrc after
    `compinit`; fish: `lora-lightning completion fish > ~/.config/fish/completions/lora-lightning.fish`.

    Args:
        shell: bash, zsh or fish; `lora-lightning completion bash` for short.

    Raises:
        ConfigError: There is no script for this shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"there is no completion for {shell!r}; known are {', '.join(SHELLS)}.")
    print(SHELLS[shell], end="")
