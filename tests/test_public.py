"""What a program that imports hvmgr sees, and what the wheel brings."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import hvmgr
from hvmgr import settings

ROOT = Path(__file__).resolve().parent.parent

# The promise to importers: a name that is added or taken away is a line of CHANGELOG.md.
PUBLIC = [
    "AdoptOptions",
    "BootEntry",
    "BootMenu",
    "BootOptions",
    "CloneOptions",
    "DiskSpecification",
    "Disks",
    "ExportOptions",
    "FileSystem",
    "FilesWanted",
    "Finding",
    "Happening",
    "Host",
    "ImageCheck",
    "ImageFault",
    "ImageFormat",
    "ImageInfo",
    "ImageOptions",
    "ImageParent",
    "Images",
    "ImportOptions",
    "ImportPlan",
    "Layout",
    "LayoutWish",
    "Mode",
    "NetbootOptions",
    "NetworkSpecification",
    "Origin",
    "Outgoing",
    "Plan",
    "Policy",
    "Progress",
    "PutOptions",
    "Release",
    "Repaired",
    "Reporter",
    "SavedState",
    "Severity",
    "Snapshot",
    "SnapshotType",
    "Specification",
    "State",
    "TableKind",
    "Usage",
    "VM",
    "Vdi",
    "WimApplyOptions",
    "WimCaptureOptions",
    "WimCompression",
    "Wims",
    "__version__",
    "errors",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def template_names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_is_exact() -> None:
    assert sorted(hvmgr.__all__) == sorted(PUBLIC)


def test_every_public_name_is_there() -> None:
    assert [name for name in hvmgr.__all__ if not hasattr(hvmgr, name)] == []


def test_nothing_else_is_exposed() -> None:
    exposed = {
        name
        for name in dir(hvmgr)
        if not name.startswith("_") and name != "annotations" and not isinstance(getattr(hvmgr, name), ModuleType)
    }
    assert exposed - set(hvmgr.__all__) == set()


def test_wheel_holds_the_package_its_templates_units_scripts_and_the_selinux_module_only(wheel: Path) -> None:
    sources = [path for path in (ROOT / "hvmgr").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {str(path.relative_to(ROOT)) for path in sources}
    expected |= {f"hvmgr/templates/{name}" for name in template_names(ROOT / "templates")}
    expected |= {f"hvmgr/systemd/{name}" for name in template_names(ROOT / "share" / "systemd")}
    for folder in ("native-boot", "netboot"):
        expected |= {f"hvmgr/{folder}/{name}" for name in template_names(ROOT / "share" / folder)}
    expected.add(f"hvmgr-{hvmgr.__version__}.data/data/share/hvmgr/selinux/hvmgr.cil")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "hvmgr/py.typed" in held
    assert held == expected


def test_wheel_names_the_version_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"hvmgr-{hvmgr.__version__}.dist-info"
        assert f"\nVersion: {hvmgr.__version__}\n" in archive.read(f"{info}/METADATA").decode()
        assert "hvmgr = hvmgr.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_templates_are_found_in_a_checkout() -> None:
    assert settings.templates_folder() == ROOT / "templates"
    assert settings.templates_folder().is_dir()


def test_templates_are_found_when_installed(installed: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    program += "from hvmgr import settings; print(settings.templates_folder())"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == installed / "hvmgr" / "templates"
    assert template_names(installed / "hvmgr" / "templates") == template_names(ROOT / "templates")
