"""The parent is found in the documented order, its id decides, and nothing outside the allowed folders is looked at."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd import format
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create
from hvmgr.vhd.format import Code, Locator
from hvmgr.vhd.image import open_image
from hvmgr.vhd.parents import find_parent
from hvmgr.vhd.reshaping import reparent, resize
from tests.vhd.disks import KIB, MIB

ID = b"the parent's id."


@pytest.fixture
def pair(tmp_path: Path):
    """A folder with ``parent.vhd`` and its child, which names it as ``..\\base\\parent.vhd``."""
    (tmp_path / "vm").mkdir()
    (tmp_path / "base").mkdir()
    create(tmp_path / "base" / "parent.vhd", MIB, uid=ID, time=datetime(2020, 1, 1, tzinfo=UTC))
    create(tmp_path / "vm" / "child.avhd", parent=tmp_path / "base" / "parent.vhd", windows_path="C:\\VMs\\parent.vhd")
    return tmp_path


def search(folder: Path, **options) -> Path:
    with open_image(folder / "vm" / "child.avhd") as child:
        return find_parent(child, **options).resolve()


def say(path: Path, texts: dict[Code, str], name: str = "") -> None:
    """The child says these texts instead of its own."""
    with open_image(path, writable=True) as image:
        locators = []
        for code, text in texts.items():
            data = format.encode_text(code, text)
            place = image.take_space(1024)
            image.file.write(place, data.ljust(1024, b"\0"))
            locators.append(Locator(code.encode(), 1024, len(data), place))
        locators += [Locator()] * (8 - len(locators))
        image.change_header(locators=tuple(locators), parent_name=format.encode_name(name))


def test_caller_says_it(pair: Path) -> None:
    assert search(pair, parent=pair / "base" / "parent.vhd") == pair / "base" / "parent.vhd"


def test_relative_text_within_an_allowed_folder(pair: Path) -> None:
    assert search(pair, folders=[pair / "base"]) == pair / "base" / "parent.vhd"


def test_relative_text_may_not_leave_the_allowed_folders(pair: Path) -> None:
    with pytest.raises(errors.NotFound, match="outside the folders that may be searched") as caught:
        search(pair)
    assert "0x" in caught.value.facts["windows"]
    assert caught.value.hint


def test_link_may_not_leave_the_allowed_folders(pair: Path) -> None:
    (pair / "vm" / "parent.vhd").symlink_to(pair / "base" / "parent.vhd")
    with pytest.raises(errors.NotFound):
        search(pair)
    assert search(pair, folders=[pair / "base"]) == pair / "base" / "parent.vhd"


def test_device_is_not_opened(pair: Path) -> None:
    os.mkfifo(pair / "vm" / "parent.vhd")
    with pytest.raises(errors.NotFound, match="no file"):
        search(pair)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (Code.RELATIVE, ".\\sub\\other.vhd"),
        (Code.RELATIVE, ".\\SUB\\Other.VHD"),
        (Code.URL, "file://./sub/other.vhd"),
        (Code.ABSOLUTE, ".\\sub\\other.vhd"),
    ],
)
def test_text_below_the_childs_folder(pair: Path, code: Code, text: str) -> None:
    (pair / "vm" / "sub").mkdir()
    shutil.move(pair / "base" / "parent.vhd", pair / "vm" / "sub" / "other.vhd")
    say(pair / "vm" / "child.avhd", {code: text})
    assert search(pair) == pair / "vm" / "sub" / "other.vhd"


def test_absolute_url_within_a_named_folder(pair: Path) -> None:
    say(pair / "vm" / "child.avhd", {Code.URL: f"file://localhost{pair}/base/parent.vhd"})
    assert search(pair, folders=[pair / "base"]) == pair / "base" / "parent.vhd"


@pytest.mark.parametrize("prefix", ["C:\\VMs", "c:\\vms\\", "C:/VMs", "C:"])
def test_absolute_text_by_way_of_the_map(pair: Path, prefix: str) -> None:
    root = pair / "base" if "s" in prefix.casefold() else pair / "disk"
    if root.name == "disk":
        shutil.copytree(pair / "base", root / "VMs")
    say(pair / "vm" / "child.avhd", {Code.ABSOLUTE: "C:\\VMs\\parent.vhd"})
    assert search(pair, windows_paths={prefix: root}).name == "parent.vhd"


def test_longest_prefix_of_the_map_counts(pair: Path) -> None:
    say(pair / "vm" / "child.avhd", {Code.ABSOLUTE: "C:\\VMs\\parent.vhd"})
    paths = {"C:": pair / "nowhere", "C:\\VMs": pair / "base", "C:\\VM": pair / "vm"}
    assert search(pair, windows_paths=paths) == pair / "base" / "parent.vhd"


def test_name_beside_the_child(pair: Path) -> None:
    shutil.move(pair / "base" / "parent.vhd", pair / "vm" / "parent.vhd")
    say(pair / "vm" / "child.avhd", {Code.ABSOLUTE: "\\\\server\\share\\gone.vhd"}, "D:\\x\\parent.vhd")
    assert search(pair) == pair / "vm" / "parent.vhd"


def test_texts_that_no_file_system_takes(pair: Path) -> None:
    shutil.move(pair / "base" / "parent.vhd", pair / "vm" / "parent.vhd")
    texts = {Code.RELATIVE: ".\\" + "x" * 300, Code.URL: "file://./%00/x", Code.ABSOLUTE: ".\\" + "y\\" * 200}
    say(pair / "vm" / "child.avhd", texts, "parent.vhd")
    assert search(pair) == pair / "vm" / "parent.vhd"


def test_id_in_named_folders(pair: Path) -> None:
    (pair / "base" / "deep").mkdir()
    shutil.move(pair / "base" / "parent.vhd", pair / "base" / "deep" / "renamed.VHD")
    assert search(pair, folders=[pair / "base"]) == pair / "base" / "deep" / "renamed.VHD"


def test_two_files_with_the_id_are_a_conflict(pair: Path) -> None:
    shutil.copy(pair / "base" / "parent.vhd", pair / "base" / "copy.vhd")
    (pair / "base" / "parent.vhd").rename(pair / "base" / "renamed.vhd")
    with pytest.raises(errors.Conflict, match=r"copy\.vhd, .*renamed\.vhd"):
        search(pair, folders=[pair / "base"])
    os.remove(pair / "base" / "copy.vhd")
    os.link(pair / "base" / "renamed.vhd", pair / "base" / "copy.vhd")
    assert search(pair, folders=[pair / "base"]).name in ("copy.vhd", "renamed.vhd")


def test_two_names_that_differ_in_case_are_a_conflict(pair: Path) -> None:
    for name in ("PARENT.vhd", "Parent.vhd"):
        shutil.copy(pair / "base" / "parent.vhd", pair / "vm" / name)
    with pytest.raises(errors.Conflict, match="differ in case only"):
        search(pair)


def test_other_id_is_passed_over_and_told(pair: Path) -> None:
    create(pair / "vm" / "parent.vhd", MIB, uid=b"another disk's !")
    with pytest.raises(errors.NotFound, match="has the id 616e6f74") as caught:
        search(pair)
    assert caught.value.facts["tried"]
    with pytest.raises(errors.Conflict, match="has the id"):
        search(pair, parent=pair / "vm" / "parent.vhd")
    assert search(pair, parent=pair / "vm" / "parent.vhd", ignore_id=True) == pair / "vm" / "parent.vhd"


@pytest.mark.parametrize("data", [bytes(MIB), b"QFI\xfb" + bytes(4096)])
def test_named_parent_that_is_no_vhd(pair: Path, data: bytes) -> None:
    (pair / "raw").write_bytes(data)
    with pytest.raises(errors.Corrupt, match="raw is no VHD"):
        search(pair, parent=pair / "raw", ignore_id=True)
    with pytest.raises(errors.NotFound):
        search(pair, parent=pair / "missing")


def test_raw_parent_of_xenserver_is_not_guessed(pair: Path) -> None:
    with open_image(pair / "vm" / "child.avhd", writable=True) as image:
        image.change_header(parent_uid=bytes(16))
    with pytest.raises(errors.Unsupported):
        search(pair, folders=[pair])


# --- chains ---


def test_time_of_the_parent_is_a_warning(pair: Path) -> None:
    parent, child = pair / "base" / "parent.vhd", pair / "vm" / "child.avhd"
    with open_chain(child, folders=[pair]) as disk:
        assert disk.faults == ()
    os.utime(parent, (1_000_000_000, 1_000_000_000))
    with open_chain(child, folders=[pair]) as disk:
        assert [one.code for one in disk.faults] == ["F44"]
    with open_image(child, writable=True) as image:
        image.change_header(parent_time=0)
    with open_chain(child, folders=[pair]) as disk:
        assert disk.faults == ()


def test_parent_of_another_size_is_a_conflict(pair: Path) -> None:
    resize(pair / "base" / "parent.vhd", 2 * MIB)
    with pytest.raises(errors.Conflict, match="2097152"):
        open_chain(pair / "vm" / "child.avhd", folders=[pair])
    with open_chain(pair / "vm" / "child.avhd", folders=[pair], any_size=True) as disk:
        assert disk.size == MIB


def test_damaged_parent_is_named(pair: Path) -> None:
    parent = pair / "base" / "parent.vhd"
    data = bytearray(parent.read_bytes())
    data[512:520] = b"nonsense"
    parent.write_bytes(data)
    with pytest.raises(errors.Corrupt, match=r"its parent is damaged: .*parent\.vhd: no header cookie"):
        open_chain(pair / "vm" / "child.avhd", folders=[pair])


def test_cycle_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "a.vhd", MIB, uid=b"a" * 16)
    create(tmp_path / "b.avhd", parent=tmp_path / "a.vhd", uid=b"b" * 16)
    create(tmp_path / "c.avhd", parent=tmp_path / "b.avhd", uid=b"c" * 16)
    with pytest.raises(errors.Corrupt, match="chain of parents"):
        reparent(tmp_path / "b.avhd", tmp_path / "c.avhd", ignore_id=True)
    with open_image(tmp_path / "b.avhd", writable=True) as image:
        assert image.header is not None
        image.change_header(parent_uid=b"c" * 16, parent_name=format.encode_name("c.avhd"))
    with pytest.raises(errors.Corrupt, match="comes back to"):
        open_chain(tmp_path / "c.avhd")


def test_longest_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvmgr.vhd.chain.MAX_DEPTH", 5)
    create(tmp_path / "0", MIB, block_size=512 * KIB)
    for number in range(1, 6):
        create(tmp_path / str(number), parent=tmp_path / str(number - 1))
    open_chain(tmp_path / "4").close()
    with pytest.raises(errors.Corrupt, match="longer than 5 files"):
        open_chain(tmp_path / "5")


def test_files_are_closed_after_a_failure(pair: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(errors.NotFound):
            open_chain(pair / "vm" / "child.avhd")
    assert len(os.listdir("/proc/self/fd")) == before
