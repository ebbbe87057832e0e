"""The collection itself: it is built whole, Ansible's own checks find nothing, and its pages say what is there."""

from __future__ import annotations

import os
import re
import sys
import tarfile

import pytest
import yaml

from tests import collection

# Each needs an environment of its own that ansible-test makes first; HVMGR_SANITY=all runs the rest (pylint above all) too.
USUAL = [
    "ansible-doc",
    "compile",
    "empty-init",
    "ignores",
    "import",
    "line-endings",
    "no-assert",
    "no-illegal-filenames",
    "no-smart-quotes",
    "pep8",
    "runtime-metadata",
    "shebang",
    "symlinks",
    "use-argspec-type-path",
    "validate-modules",
    "yamllint",
]
MODULES = sorted(path.stem for path in (collection.HERE / "plugins" / "modules").glob("*.py"))
PAGE = (collection.HERE.parent / "docs" / "ansible.md").read_text("utf-8")


@pytest.mark.timeout(900)
def test_sanity(ansible_home, tmp_path):
    names = [] if os.environ.get("HVMGR_SANITY") == "all" else USUAL
    done = collection.sanity(tmp_path, ansible_home, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All targets skipped" not in done.stdout + done.stderr
    assert set(USUAL) <= set(re.findall(r'^Running sanity test "([\w-]+)"', done.stdout + done.stderr, re.MULTILINE))


def test_units_of_the_collection(installed, ansible_home):
    """As ``ansible-test units`` runs them, but for the environment that it would make."""
    place = installed / "ansible_collections" / collection.NAME / "tests" / "unit"
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        place,
        place,
    ]
    done = collection.run(argv, cwd=installed, home=ansible_home, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout + done.stderr


def test_archive_holds_what_users_need_and_no_more(installed, tmp_path):
    (archive,) = installed.glob("hvmgr-hvmgr-*.tar.gz")
    with tarfile.open(archive) as told:
        names = set(told.getnames())
    assert {"README.md", "COPYING", "meta/runtime.yml", "roles/host/tasks/main.yml", "playbooks/gold.yml"} <= names
    assert [name for name in names if name.startswith((".", "ruff", "tests/output"))] == []


def test_action_group_has_every_module():
    runtime = yaml.safe_load((collection.HERE / "meta" / "runtime.yml").read_text("utf-8"))
    assert runtime["action_groups"]["all"] == MODULES


@pytest.mark.parametrize("name", [*MODULES, "vms", "host"])
def test_pages_name_everything(name):
    assert f"`{name}`" in PAGE
    assert f"`{name}`" in (collection.HERE / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["gold", "patch", "nightly"])
def test_page_has_the_playbooks_as_they_are(name):
    assert f"```yaml\n{(collection.HERE / 'playbooks' / f'{name}.yml').read_text('utf-8')}```" in PAGE


def test_version_is_that_of_hvmgr():
    import hvmgr

    galaxy = yaml.safe_load((collection.HERE / "galaxy.yml").read_text("utf-8"))
    assert galaxy["version"] == hvmgr.__version__
