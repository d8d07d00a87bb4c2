"""One engine on the real model for all tests of the adapters, which run without any network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_socket import disable_socket, enable_socket

from dendrite.engine.engine import Engine
from dendrite.integrations.engines import ENGINES

SHARED = "dendrite-test"
"""The name under which the adapters find it."""
OTHER = "smollm2-135m-instruct"
"""A second name for it, and its own: tests that ask for another model get this one."""


@pytest.fixture(scope="session")
def shared_engine(real_model_folder: Path) -> Iterator[Engine]:
    """Load the default model once."""
    with Engine.load(str(real_model_folder), kv_memory="512MiB") as engine:
        for name in (SHARED, OTHER):
            ENGINES.register(name, engine)
        yield engine
        for name in (SHARED, OTHER):
            ENGINES.unregister(name)


@pytest.fixture(autouse=True)
def _no_sockets() -> Iterator[None]:
    """No test of this folder opens a connection; event loops may have their socket pairs."""
    disable_socket(allow_unix_socket=True)
    yield
    enable_socket()
