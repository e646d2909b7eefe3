import sys

import pytest
import torch

torch.set_num_threads(1)  # and in no test more: GNU OpenMP hangs in forks of a process that has used two


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Let no test read what another run has kept, nor leave anything in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _reseed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_loader_classes():
    """Leave no wrappers of Lightning on torch's loader classes after a loader of a test's own has failed."""
    yield
    if "lightning" in sys.modules:
        from lora_lightning.data.batches.restored import restore_loader_classes

        restore_loader_classes()


def pytest_collection_modifyitems(config, items):
    """Leave out the tests marked `gpu` where there is no CUDA device; pytest counts them as deselected."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=on_gpu)
    items[:] = [item for item in items if item not in on_gpu]
