"""The Hugging Face hub, and what it left in its cache: the one room that talks to it."""

from __future__ import annotations

import threading
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

import huggingface_hub
from huggingface_hub import HfApi, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from dendrite.engine.checkpoint import is_complete
from dendrite.engine.errors import ModelError
from dendrite.engine.progress import Report

REACH_SECONDS = 5.0
"""How long the hub may take to answer; a name server that never answers is cut off by it too."""

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
UNWANTED = ("*/*", "consolidated*")
"""Other formats of the same weights: subfolders (onnx, original) and Mistral's own layout."""


class Hub(Protocol):
    """Where models come from by their id."""

    def cached(self, repo: str) -> Path | None:
        """The folder of a model that is on this machine, whole; asks nobody."""
        ...

    def download(self, repo: str, report: Report) -> Path:
        """Fetch what is missing or newer; the model's folder.

        Raises:
            ModelError: the hub cannot be reached, or does not give the model.
        """
        ...

    def remove(self, repo: str) -> int:
        """Remove the model from this machine; the bytes that this freed, 0 if it was not there."""
        ...


class HuggingFaceHub:
    """The hub through its own client, in its own cache, shared with everything else that uses it."""

    def cached(self, repo: str) -> Path | None:
        """The newest snapshot in the cache, if all its files are there."""
        try:
            folder = Path(_snapshot(repo, local_files_only=True))
        except (OSError, ValueError):
            return None
        return folder if is_complete(folder) else None

    def download(self, repo: str, report: Report) -> Path:
        """Fetch the model's newest revision; interrupted downloads go on where they stopped."""
        info = self._reach(repo)
        report.say(f"fetching {repo} from the hub ({_wanted_bytes(info) / 1e6:,.0f} MB)")
        try:
            return Path(_snapshot(repo, revision=info.sha))
        except Exception as error:
            raise _refusal(repo, error) from error

    def remove(self, repo: str) -> int:
        """Remove all revisions of the model from the cache."""
        try:
            cache = scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE)
        except CacheNotFound:
            return 0
        revisions = [each.commit_hash for entry in cache.repos if entry.repo_id == repo for each in entry.revisions]
        strategy = cache.delete_revisions(*revisions)
        strategy.execute()
        return int(strategy.expected_freed_size)

    def _reach(self, repo: str) -> ModelInfo:
        """Ask for the model's newest revision, for at most `REACH_SECONDS`."""
        if huggingface_hub.constants.is_offline_mode():
            raise ModelError("hub not asked: HF_HUB_OFFLINE is set")
        answers: list[ModelInfo | Exception] = []
        # A daemon, because looking up a host's name cannot be interrupted and must not hold up the interpreter's exit.
        asker = threading.Thread(target=_ask, args=(repo, answers), name="dendrite-hub", daemon=True)
        asker.start()
        asker.join(REACH_SECONDS)
        if not answers:
            raise ModelError(f"hub not reachable (no answer within {REACH_SECONDS:.0f} s)")
        if isinstance(answers[0], Exception):
            raise _refusal(repo, answers[0]) from answers[0]
        return answers[0]


def _snapshot(repo: str, *, revision: str | None = None, local_files_only: bool = False) -> str:
    return snapshot_download(
        repo,
        revision=revision,
        allow_patterns=list(WANTED),
        ignore_patterns=list(UNWANTED),
        local_files_only=local_files_only,
    )


def _ask(repo: str, answers: list[ModelInfo | Exception]) -> None:
    try:
        answers.append(HfApi().model_info(repo, timeout=REACH_SECONDS, files_metadata=True))
    except Exception as error:  # noqa: BLE001  (handed to the thread that waits)
        answers.append(error)


def _wanted_bytes(info: ModelInfo) -> int:
    weights = [file for file in info.siblings or [] if fnmatch(file.rfilename, "*.safetensors")]
    return sum(file.size or 0 for file in weights if not any(fnmatch(file.rfilename, each) for each in UNWANTED))


def _refusal(repo: str, error: Exception) -> ModelError:
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{repo} asks its users to accept a licence: accept it on the model's page of the hub, "
            "then log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(f"the hub has no model {repo}, or it is private and you are not logged in (`hf auth login`)")
    reason = str(error).strip().splitlines()
    return ModelError(f"hub not reachable ({reason[0] if reason else type(error).__name__})")
