import pytest
import torch

torch.set_num_threads(1)  # and in no test more: GNU OpenMP hangs in forks of a process that has used two


@pytest.fixture(autouse=True)
def _reseed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Leave out the tests marked `gpu` where there is no CUDA device; pytest counts them as deselected."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=on_gpu)
    items[:] = [item for item in items if item not in on_gpu]
