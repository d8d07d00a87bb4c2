"""What the repository as a whole keeps to: nothing of anybody's machine in it, and everything it names is there."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

MACHINE_PATH = re.compile(r"(?<![\w.~<>*-])/(?:home|root|Users|work|mnt|opt|srv|tmp)/[\w.]")
EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b")
IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
REGISTRY = re.compile(r"\b(?:pypi|pythonhosted)\.org\b|\bdownload\.pytorch\b")
URL_HOST = re.compile(r"https?://([^/\s)\"'`>]+)")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)")

KNOWN_HOSTS = {
    "arxiv.org",
    "github.com",
    "keepachangelog.com",
    "pytorch.org",
    "semver.org",
    "www.apache.org",
    "www.w3.org",
}
LOOPBACK = {"127.0.0.1", "0.0.0.0"}  # noqa: S104 (compared with text, nothing binds to it)
MAX_FILE_BYTES = 500_000


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("needs a git checkout, this is a plain folder")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def tracked_lines() -> Iterator[tuple[str, str]]:
    """Yield every line of every tracked text file as (where, line)."""
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            yield f"{path.relative_to(ROOT)}:{number}", line


@pytest.mark.parametrize("pattern", [MACHINE_PATH, EMAIL, REGISTRY], ids=["path", "email", "registry"])
def test_nothing_of_a_machine_is_tracked(pattern: re.Pattern[str]) -> None:
    """No tracked file names a path, an address or a package registry of somebody's machine."""
    found = [f"{where}: {line.strip()}" for where, line in tracked_lines() if pattern.search(line)]
    assert not found, "\n".join(found)


def test_no_address_but_the_loopback_is_tracked() -> None:
    """No tracked file names a machine by its IP address."""
    found = [where for where, line in tracked_lines() if set(IPV4.findall(line)) - LOOPBACK]
    assert not found, "\n".join(found)


def test_links_lead_to_known_hosts() -> None:
    """Every URL in a tracked file leads to one of the few hosts that a reader is sent to on purpose."""
    found = [f"{where}: {host}" for where, line in tracked_lines() for host in URL_HOST.findall(line)]
    unknown = [entry for entry in found if entry.rpartition(" ")[2] not in KNOWN_HOSTS]
    assert not unknown, "\n".join(unknown)


def test_no_large_file_is_tracked() -> None:
    """Weights and recordings stay out of the repository."""
    large = [str(path) for path in tracked_files() if path.stat().st_size > MAX_FILE_BYTES]
    assert not large


def test_every_dependency_is_pinned_for_development() -> None:
    """The constraints file holds a version, within the declared range, of everything pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    lines = (ROOT / "constraints-dev.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pairs}
    for requirement in wanted:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_readme_links_exist() -> None:
    """Every relative link of the README leads to a file."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [target for target in LINK.findall(readme) if not (ROOT / target).exists()]
    assert not missing


def test_every_test_says_what_it_shows() -> None:
    """Each test function has a docstring of one line."""
    silent = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in sorted((ROOT / "tests").glob("**/test_*.py"))
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and function.name.startswith("test_")
        and "\n" in (ast.get_docstring(function) or "\n")
    ]
    assert not silent, "\n".join(silent)
