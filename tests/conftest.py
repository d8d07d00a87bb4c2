"""What every test shares: those marked `gpu` are skipped, with the reason, where there is no CUDA device."""

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None, print_blob=True)  # a busy machine is not a failure
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or _has_cuda():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


def _has_cuda() -> bool:
    import torch  # here, so that the tests of the torch-free rooms start at once

    return torch.cuda.is_available()
