"""The Ansible collection as users get it: built, installed, and checked by ansible-test. For the tests and for ``bench``.

``ansible-test`` makes virtual environments of its own from the Python package index, and fetches pip for them from a place
of Ansible's. Here pip comes from the index too: a file in ansible-test's cache, where it looks first, lends that one pip to
each environment. Installing it took more than all the checks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "ansible"
NAME = "hvmgr/hvmgr"

_GET_PIP = """\
import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "lent-pip.pth").write_text({folder!r} + "\\n")
"""


def program(name):
    """A program of Ansible's in the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def environment(home, **more):
    """Nothing of this machine's Ansible is seen or touched."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "PYTHON"))}
    return {
        **keep,
        "HOME": str(home),
        "ANSIBLE_HOME": str(home / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
        "LC_ALL": "C.UTF-8",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **more,
    }


def run(argv, *, cwd, home, timeout_s=300, **more):
    """The finished process, its output as text."""
    return subprocess.run(
        [str(one) for one in argv],
        cwd=cwd,
        env=environment(home, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def build(folder, home):
    """The archive that ``ansible-galaxy collection build`` makes in ``folder``."""
    done = run([program("ansible-galaxy"), "collection", "build", "--output-path", folder], cwd=HERE, home=home)
    assert done.returncode == 0, done.stderr
    (archive,) = Path(folder).glob("hvmgr-hvmgr-*.tar.gz")
    return archive


def install(archive, folder, home):
    """The folder to name in ANSIBLE_COLLECTIONS_PATH; nothing is asked of any server."""
    argv = [program("ansible-galaxy"), "collection", "install", "--offline", archive, "--collections-path", folder]
    done = run(argv, cwd=folder, home=home)
    assert done.returncode == 0, done.stderr
    return Path(folder)


def copy(folder):
    """The collection's files where ansible-test wants them: no repository, no link, and the two names above."""
    target = Path(folder) / "ansible_collections" / NAME
    shutil.copytree(HERE, target, ignore=shutil.ignore_patterns("output", "*.tar.gz", "__pycache__", "ruff.toml"))
    return target


def pip_version():
    """The pip that this ansible-test asks for: 23.1.2 that of ansible-core 2.17, 24.2 those of 2.18 and 2.19."""
    spec = importlib.util.find_spec("ansible_test")
    text = Path(spec.submodule_search_locations[0], "_internal", "python_requirements.py").read_text("utf-8")
    return re.findall(r"\bpip='([\d.]+)'", text)[-1]


def bring_pip(cache):
    """ansible-test in this HOME finds a pip; ``cache`` is kept from one run to the next."""
    version = pip_version()
    folder = Path(cache) / f"pip-{version}"
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=cache))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        argv = [*pip, "--target", os.fspath(made), f"pip=={version}"]
        subprocess.run(argv, check=True, timeout=120, stdin=subprocess.DEVNULL)
        made.rename(folder)
    script = Path(cache) / ".ansible" / "test" / "cache" / f"get_pip_{version.replace('.', '_')}.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(_GET_PIP.format(folder=str(folder)))


def sanity(folder, cache, *names):
    """One run of ``ansible-test sanity``, with all of its tests unless some are named."""
    bring_pip(cache)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    argv = [program("ansible-test"), "sanity", "--local", "--python", version, "--color", "no"]
    argv += [word for name in names for word in ("--test", name)]
    return run(argv, cwd=copy(folder), home=Path(cache), timeout_s=900)
