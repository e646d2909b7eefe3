"""What importing the package costs, and what its public names are."""

import subprocess
import sys

import pytest

import lora_lightning

HEAVY = ("torch", "transformers", "lightning", "jsonargparse", "torchmetrics", "pandas")


def loaded_after(code: str) -> set[str]:
    """Return the heavy libraries that a fresh interpreter has imported after running `code`."""
    report = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_after("import lora_lightning") == set()


def test_methods_need_torch_alone():
    assert loaded_after("from lora_lightning import LoRA, attach; LoRA(r=2)") == {"torch"}


def test_help_imports_neither_torch_nor_transformers():
    assert loaded_after("from lora_lightning.__main__ import main; main(['--help'])") == set()


@pytest.mark.parametrize("name", lora_lightning.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(lora_lightning, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(lora_lightning)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        lora_lightning.no_such_name  # noqa: B018
