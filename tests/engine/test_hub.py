import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from dendrite.engine import hub as hub_module
from dendrite.engine.checkpoint import file_sha256
from dendrite.engine.errors import ModelError
from dendrite.engine.hub import HuggingFaceHub
from dendrite.engine.models import load_model
from dendrite.engine.registry import ModelStore
from tests.engine.notes import Notes

REPO = "nobody/tiny-model"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_snapshot(hub_cache: Path, model: Path) -> Path:
    """Lay a model's files down as the hub's client does."""
    revision = "0" * 40
    home = hub_cache / f"models--{REPO.replace('/', '--')}"
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    for file in model.iterdir():
        blob = home / "blobs" / file_sha256(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_a_model_in_the_hubs_cache_is_used(hub_cache: Path, tiny_folder: Callable[[str], Path]) -> None:
    """A snapshot that another tool left is found without asking anybody, listed, loaded and removed."""
    snapshot = put_snapshot(hub_cache, tiny_folder("llama"))
    hub = HuggingFaceHub()
    assert hub.cached(REPO) == snapshot
    store = ModelStore(cache=hub_cache, hub=hub, report=Notes())
    assert load_model(REPO, store=store).source == f"hub: {REPO}"
    assert hub.remove(REPO) > 0
    assert hub.cached(REPO) is None
    assert hub.remove(REPO) == 0


def test_half_a_snapshot_is_not_a_model(hub_cache: Path, tiny_folder: Callable[[str], Path]) -> None:
    """An interrupted download is not taken for the model."""
    snapshot = put_snapshot(hub_cache, tiny_folder("llama"))
    (snapshot / "model.safetensors").unlink()
    assert HuggingFaceHub().cached(REPO) is None


def test_no_hub_is_asked_when_it_is_switched_off(hub_cache: Path) -> None:
    """HF_HUB_OFFLINE is honoured at once."""
    with pytest.raises(ModelError, match="hub not asked: HF_HUB_OFFLINE is set"):
        HuggingFaceHub().download(REPO, Notes())
    assert HuggingFaceHub().remove(REPO) == 0


def test_a_hub_that_never_answers_is_given_up(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that hangs does not hang the load."""
    released = threading.Event()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: released.wait())
    monkeypatch.setattr(hub_module, "REACH_SECONDS", 0.05)
    with pytest.raises(ModelError, match="hub not reachable"):
        HuggingFaceHub().download(REPO, Notes())
    released.set()
