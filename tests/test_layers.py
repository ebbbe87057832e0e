"""Imports point down only, each outside thing has one keeper, and words stay words: over the whole tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).resolve().parent.parent / "hvmgr"

# From the ground up; the modules of one line may import each other.
LAYERS = {
    module: height
    for height, modules in enumerate(
        [
            "errors os_errors units yaml_text keeping preferences settings version write_behind",
            "model",
            "host",
            "vhd",
            "storage",
            "operations",
            "faces",
            "__init__ __main__",
        ]
    )
    for module in modules.split()
}

# What a layer may import besides itself, where the layers below it are too many: the codec knows nothing of VMs.
ALONE = {"vhd": {"errors", "os_errors", "units", "write_behind"}}

# What only some files may name: modules and functions by their dotted name, with everything below it.
DURABLE = ["storage/durable.py", "vhd/file.py"]  # the codec works without storage, which is above it
REMOVERS = [*DURABLE, "host/"]  # host removes the temporary files and sockets that it made itself
KEEPERS = {
    door: keepers
    for doors, keepers in [
        ("libvirt libvirt_qemu libvirt_lxc libvirtaio libvirtmod", ["host/libvirt_door.py"]),
        ("qemu", ["host/qmp.py"]),
        ("qemu.qmp.legacy", []),  # GPL-2
        ("subprocess multiprocessing pty asyncio.create_subprocess_exec", ["host/process.py"]),
        (
            "os.system os.popen os.fork os.posix_spawn os.execv os.execve os.execvp",
            ["host/process.py", "host/patience.py"],
        ),
        ("os.fsync os.fdatasync os.sync os.rename os.renames os.replace shutil.move", DURABLE),
        ("pathlib.Path.rename pathlib.Path.replace", DURABLE),
        ("os.unlink os.remove os.rmdir os.removedirs shutil.rmtree", REMOVERS),
        ("pathlib.Path.unlink pathlib.Path.rmdir", REMOVERS),
        ("print sys.stdout sys.stderr click rich", ["faces/", "__main__.py"]),
        ("h11", ["faces/http/", "faces/cli/serve.py"]),
    ]
    for door in doors.split()
}
# Methods of a path whose owner's type ast cannot see. `.replace` and `.rename` with one argument are a path's: those
# of str and datetime take two or keywords, and the rename of an operation takes a VM and a name. A domain is no path.
MOVES, REMOVALS, NO_PATHS = ("rename", "replace"), ("unlink", "rmdir"), ("domain",)


def breaches(source: str, path: PurePath) -> list[str]:
    """What the file at ``path`` (relative to the package) may not do, each with its line."""
    tree = ast.parse(source)
    names = _imported(tree, path)
    found = [
        f"{path}:{line}: {word}: {why}"
        for line, word in [*_imports(tree, path), *_mentions(tree, names)]
        if (why := _forbidden(word, path))
    ]
    found += [f"{path}:{line}: {word} belongs to storage/durable" for line, word in _path_methods(tree, names, path)]
    found += [f"{path}:{line}: no identifier of ours says {word}" for line, word in _defined(tree) if _is_alien(word)]
    return sorted(set(found))


def _forbidden(word: str, path: PurePath) -> str | None:
    head, _, rest = word.partition(".")
    if head == "hvmgr":
        target, own = rest.partition(".")[0] or "__init__", path.parts[0].removesuffix(".py")
        if target not in LAYERS or own not in LAYERS:
            return "a top-level module that the layer test does not know"
        if own in ALONE and target not in {own, *ALONE[own]}:
            return f"{own} stands alone"
        return f"{own} is below {target}" if LAYERS[target] > LAYERS[own] else None
    for door, keepers in KEEPERS.items():
        if (word + ".").startswith(door + ".") and not _is_among(path, keepers):
            return f"only in {', '.join(keepers) or 'no file'}"
    return None


def _is_among(path: PurePath, keepers: list[str]) -> bool:
    return any(str(path) == keeper or (keeper.endswith("/") and str(path).startswith(keeper)) for keeper in keepers)


def _is_alien(word: str) -> bool:
    return "checkpoint" in word.lower()


def _module(node: ast.ImportFrom, path: PurePath) -> str:
    """The absolute name of the module that ``from … import`` names."""
    if not node.level:
        return node.module or ""
    package = ["hvmgr", *path.parent.parts]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def _imports(tree: ast.AST, path: PurePath) -> Iterator[tuple[int, str]]:
    """Every module that is imported anywhere: inside functions, for type checking only, relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _module(node, path)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _imported(tree: ast.AST, path: PurePath) -> dict[str, str]:
    """What a local name stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{_module(node, path)}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, names)):
        return f"{owner}.{node.attr}"
    return None


def _mentions(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Functions of imported modules, also when they are only handed on; and ``print``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (word := _dotted(node, names)) and not word.startswith("hvmgr."):
            yield node.lineno, word
        elif isinstance(node, ast.Name) and node.id == "print":
            yield node.lineno, "print"


def _path_methods(tree: ast.AST, names: dict[str, str], path: PurePath) -> Iterator[tuple[int, str]]:
    moves = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or _dotted(node, names) or _is_among(path, DURABLE):
            continue
        if (node.attr in MOVES and id(node) in moves and ast.unparse(node.value) not in NO_PATHS) or (
            node.attr in REMOVALS and not _is_among(path, REMOVERS)
        ):
            yield node.lineno, f".{node.attr}()"


def _defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that we give; what libvirt calls its things is its own affair."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield getattr(node, "lineno", 0), node.asname


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_its_layer_and_its_doors(path: PurePath) -> None:
    assert path.parts[0].removesuffix(".py") in LAYERS, "a top-level module that the layer test does not know"
    assert not _is_alien(str(path))
    assert breaches((PACKAGE / path).read_text("utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param("model/tree.py", "from hvmgr.storage import durable", id="import-upwards"),
        pytest.param("host/process.py", "import hvmgr.vhd.format", id="dotted-import-upwards"),
        pytest.param("errors.py", "from hvmgr import model", id="package-as-a-name"),
        pytest.param("storage/copy.py", "from hvmgr import __version__", id="top-of-the-package"),
        pytest.param("storage/copy.py", "from ..operations import merge", id="relative-import"),
        pytest.param("model/tree.py", "def f():\n    from hvmgr import host", id="lazy-import"),
        pytest.param("model/tree.py", "if TYPE_CHECKING:\n    from hvmgr.host import process", id="import-for-types"),
        pytest.param("faces/cli/main.py", "from hvmgr import helpers", id="unknown-module"),
        pytest.param("operations/vms.py", "import libvirt", id="libvirt"),
        pytest.param("operations/vms.py", "import libvirt_qemu", id="libvirt-qemu"),
        pytest.param("host/hypervisor.py", "from qemu.qmp import QMPClient", id="qmp"),
        pytest.param("host/qmp.py", "import qemu.qmp.legacy", id="gpl-module"),
        pytest.param("host/qemu_img.py", "from subprocess import run", id="subprocess"),
        pytest.param("host/qemu_img.py", "import os as o\no.system('true')", id="alias"),
        pytest.param("vhd/image.py", "from hvmgr.host import process", id="codec-uses-a-lower-layer"),
        pytest.param("vhd/image.py", "import os\nsync = os.fsync", id="fsync-handed-on"),
        pytest.param("vhd/image.py", "from os import replace as put", id="replace-by-name"),
        pytest.param("storage/copy.py", "import shutil\nshutil.move(a, b)", id="move"),
        pytest.param("storage/copy.py", "new.rename(old)", id="path-rename"),
        pytest.param("storage/copy.py", "Path(new).replace(old)", id="path-replace"),
        pytest.param("operations/merge.py", "path.unlink(missing_ok=True)", id="unlink"),
        pytest.param("operations/merge.py", "stack.callback(path.unlink)", id="unlink-handed-on"),
        pytest.param("operations/merge.py", "import shutil\nshutil.rmtree(path)", id="rmtree"),
        pytest.param("operations/merge.py", "print('done')", id="print"),
        pytest.param("operations/merge.py", "import sys\nsys.stderr.write('')", id="stderr"),
        pytest.param("operations/merge.py", "from rich import table", id="rich"),
        pytest.param("operations/merge.py", "def list_checkpoints(): ...", id="alien-word"),
        pytest.param("operations/merge.py", "self.checkpoint = 1", id="alien-attribute"),
    ],
)
def test_breach_is_seen(path: str, source: str) -> None:
    assert breaches(source, PurePath(path)) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param(
            "operations/vms.py", "from hvmgr.host import hypervisor\nfrom hvmgr import errors", id="downwards"
        ),
        pytest.param("storage/vm_home.py", "from . import durable", id="sibling"),
        pytest.param(
            "host/libvirt_door.py", "import libvirt\nlibvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA", id="libvirt"
        ),
        pytest.param("storage/durable.py", "import os\nos.replace(a, b)\nos.fsync(f)\nb.unlink()", id="durable"),
        pytest.param("host/process.py", "import subprocess\nsocket.unlink()", id="host"),
        pytest.param("vhd/image.py", "from hvmgr import errors, units\nfrom hvmgr.vhd import format", id="codec"),
        pytest.param("faces/cli/main.py", "import click\nprint(text)", id="face"),
        pytest.param(
            "faces/cli/vm.py", "from hvmgr.operations import vms\nvms.rename(vm)", id="operation-named-rename"
        ),
        pytest.param("operations/vms.py", "domain.rename(name)", id="domain-rename"),
        pytest.param("model/layout.py", "text.replace('a', 'b')\nstamp.replace(microsecond=0)", id="other-replaces"),
        pytest.param("model/layout.py", "import os\nos.path.join(a, b)\nos.fspath(a)", id="harmless-os"),
    ],
)
def test_right_use_passes(path: str, source: str) -> None:
    assert breaches(source, PurePath(path)) == []


# What ast cannot see: importlib and what other packages import. A hook that loads libvirt deadlocks libvirtd.
HEAVY = {"libvirt", "lxml", "qemu", "yaml", "rich", "asyncio", "subprocess"}
LIGHT = {
    "hvmgr": HEAVY,
    "hvmgr.errors": HEAVY,
    "hvmgr.settings": HEAVY,
    "hvmgr.vhd": HEAVY,
    "hvmgr.faces.hook": {"libvirt", "qemu", "rich"},
}


@pytest.mark.parametrize(
    "module", [m for m in LIGHT if m != "hvmgr.faces.hook" or (PACKAGE / "faces/hook.py").is_file()]
)
def test_light_module_loads_nothing_heavy(module: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    assert set(loaded.split()) & LIGHT[module] == set()
