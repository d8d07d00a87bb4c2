"""What every test shares: those marked `gpu` are skipped, with the reason, where there is no CUDA device."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, by whomever

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors; so do their threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is first imported

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


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    """Return the default model's folder, in the user's own cache; the first run fetches it."""
    from dendrite.engine.registry import ModelStore

    return ModelStore().locate("smollm2-135m-instruct").path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a maker of folders of tiny random models, by a family's name in `models_zoo.EXACT`. Do not write there."""
    from tests.models_zoo import EXACT, save_tiny_model

    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = save_tiny_model(tmp_path_factory.mktemp(family), EXACT[family]())
        return folders[family]

    return make
