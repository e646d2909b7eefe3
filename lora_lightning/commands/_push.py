"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.backbones.reasons import reason_of
from lora_lightning.checkpoint.base_name import name_for_others
from lora_lightning.checkpoint.manifest import read_manifest
from lora_lightning.errors import ConfigError, UploadError
from lora_lightning.texts.model_card import CARD_NAME, is_untouched

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = re.compile(r"(model|adapter_model|adapter)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A repository of the Hub to upload to.

    Args:
        repo: Its name, `owner/name`.
        private: Whether it must be private; otherwise the account's default applies, usually public.
    """

    repo: str
    private: bool

    @classmethod
    def of(cls, repo: str | None, private: bool) -> Target | None:
        """Check the options before anything is written; None if nothing is to be uploaded.

        Raises:
            ConfigError: The name is not that of a repository, or this process cannot reach the Hub as a user.
        """
        if repo is None:
            if private:
                raise ConfigError("private is for push_to_hub; name the repository with --push_to_hub owner/name.")
            return None
        from huggingface_hub import get_token
        from huggingface_hub.constants import is_offline_mode
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ConfigError(f"push_to_hub is {repo!r}: expected owner/name ({reason_of(error)})") from error
        if not _NAME.fullmatch(repo):
            raise ConfigError(f"push_to_hub is {repo!r}: expected owner/name, such as me/my-adapter.")
        if is_offline_mode():
            raise ConfigError("push_to_hub needs the Hub, and HF_HUB_OFFLINE keeps this process from it; unset it.")
        if get_token() is None:
            raise ConfigError("push_to_hub needs an account of the Hub: run `hf auth login`, or set HF_TOKEN.")
        return cls(repo=repo, private=private)

    def upload(self, folder: Path) -> str:
        """Create the repository if it is missing, upload a folder in one commit, and return its URL.

        A model card that another person wrote or edited is kept. Weights in the repository that the folder does not
        have are removed, since transformers would load them instead.

        Raises:
            UploadError: The Hub refuses or cannot be reached; the folder is unchanged.
        """
        from huggingface_hub import HfApi

        api = HfApi(library_name="lora_lightning")
        try:
            url = str(api.create_repo(self.repo, private=self.private or None, exist_ok=True))
            if self.private and not api.repo_info(self.repo).private:
                raise UploadError(
                    f"{self.repo} is public already, and private was asked for; nothing was uploaded, the files are "
                    f"in {folder}. Make the repository private, or name another."
                )
            api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message="Upload from lora_lightning",
                ignore_patterns=[CARD_NAME] if _has_own_card(api, self.repo) else [],
                delete_patterns=_stale_weights(api, self.repo, folder),
            )
        except UploadError:
            raise
        except Exception as error:  # whatever the network or the Hub raises: there is no common class
            raise UploadError(
                f"{folder} was written and stays, but {self.repo} did not take it: {_reason(error)}. Upload it later: "
                f"hf upload {self.repo} {folder}"
            ) from error
        return url


def push(target: Target | None, folder: str) -> None:
    """Upload a folder if a repository is named, and print its URL.

    Raises:
        UploadError: See `Target.upload`.
    """
    if target is None:
        return
    base = read_manifest(Path(folder)).base
    if base is not None and name_for_others(base) is None:
        warnings.warn(
            f"The files name the base by a path of this machine ({base}), which others cannot load; give its Hub name "
            "with --backbone.",
            stacklevel=2,
        )
    print(f"Uploaded {folder} to {target.upload(Path(folder))}.")


def _reason(error: Exception) -> str:
    """Return the error of the Hub after its status, or that of the network."""
    first, said = reason_of(error), getattr(error, "server_message", None)
    is_told = not said or said in first
    return (first if is_told else f"{first.partition(':')[0]}: {said}").rstrip(". ")


def _has_own_card(api: Any, repo: str) -> bool:  # noqa: ANN401 - huggingface_hub's HfApi
    """Return whether a repository has a model card that this library did not write, or that was edited."""
    if not api.file_exists(repo, CARD_NAME):
        return False
    return not is_untouched(Path(api.hf_hub_download(repo, CARD_NAME)))


def _stale_weights(api: Any, repo: str, folder: Path) -> list[str]:  # noqa: ANN401 - huggingface_hub's HfApi
    """Return the weight files at the top of a repository that a folder does not have."""
    names = [name for name in api.list_repo_files(repo) if _WEIGHTS.fullmatch(name)]
    return [name for name in names if not (folder / name).exists()]
