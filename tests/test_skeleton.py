"""The files around the package agree with it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import hvmgr
from hvmgr.faces.cli.groups import EXIT_CODES

ROOT = Path(__file__).resolve().parent.parent


def test_version_is_the_newest_of_the_changelog() -> None:
    newest = re.search(
        r"^## (\S+) - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert newest is not None
    assert newest[1] == hvmgr.__version__


@pytest.mark.parametrize("script", [".ci/setup", ".ci/install", ".ci/run", ".ci/test", ".ci/scratch"])
def test_script_is_executable_bash(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 == 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_install_brings_the_packages_of_the_role() -> None:
    script = (ROOT / ".ci/install").read_text("utf-8")
    inside = "\n".join(re.findall(r"packages\+?=\((.*?)\)", script, re.DOTALL))
    ours = {word for line in inside.splitlines() for word in line.partition("#")[0].split()}
    role = (ROOT / "ansible/roles/host/vars/Debian.yml").read_text("utf-8").partition("_packages:")[2]
    theirs = {word for line in role.splitlines() for word in re.findall(r"(?:^  - |'|else ')([a-z][a-z0-9.-]+)", line)}
    assert ours == theirs - {"architecture", "aarch64"}


def test_install_refuses_what_it_would_overwrite(tmp_path: Path) -> None:
    foreign = tmp_path / "hvmgr"
    foreign.write_text("somebody's")
    done = subprocess.run(
        [ROOT / ".ci/install", tmp_path / "prefix", foreign], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no link of ours" in done.stderr or "only root" in done.stderr
    assert (foreign.read_text(), sorted(one.name for one in tmp_path.iterdir())) == ("somebody's", ["hvmgr"])


def test_tmp_of_its_own_goes_with_the_command(tmp_path_factory) -> None:
    """Where it cannot be had the command has the one that is there."""

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(one) for one in command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
        )

    name = f"/tmp/{tmp_path_factory.mktemp('scratch').name}-{os.getpid()}"
    device = "df --output=source /tmp | tail -n 1"
    outside = run("sh", "-c", device).stdout
    done = run(ROOT / ".ci/scratch", "sh", "-c", f"touch {name}; {device}; exit 7")
    assert (done.returncode, done.stderr) == (7, "")
    assert Path(name).exists() == (done.stdout == outside)
    Path(name).unlink(missing_ok=True)


def test_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make (\w+)", told, re.MULTILINE) == targets[1].split()


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_begins_with_the_two_commands() -> None:
    first, _, _ = (ROOT / "README.md").read_text("utf-8").partition("\n## ")
    assert "    make demo" in first
    assert "    make test" in first


def test_readme_and_help_name_every_exit_code() -> None:
    told = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [int(code) for code in told] == sorted(EXIT_CODES)


def test_documents_name_modules_that_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:hvmgr|tests|bench|docs)/[\w/.*]+)`", page.read_text("utf-8")):
            assert list(ROOT.glob(name)), f"{page.name}: {name}"


def test_architecture_names_every_module_below_the_faces() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for layer in ("operations", "storage", "host", "model"):
        told = "\n".join(re.findall(rf"^- {layer}[,:] (.*)", page, re.MULTILINE))
        there = {path.stem for path in (ROOT / "hvmgr" / layer).rglob("*.py")} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", told)) == there


def test_source_archive_holds_what_the_tests_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in ["hvmgr", "templates", "tests", ".ci", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"]:
        assert f"/{name}" in included
        assert (ROOT / name).exists()


@pytest.mark.parametrize(
    ("complete", "outcome"),
    [
        pytest.param("0", pytest.skip.Exception, id="skipped-at-a-desk"),
        pytest.param("1", pytest.fail.Exception, id="failed-in-ci"),
    ],
)
def test_missing_program_is_never_silent(complete, outcome, monkeypatch, require_program):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("HVMGR_REQUIRE_ALL", complete)
    assert require_program("sh").name == "sh"
    with pytest.raises(outcome, match="no-such-program"):
        require_program("no-such-program")
