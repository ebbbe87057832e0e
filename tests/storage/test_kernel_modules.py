"""Modules of a kernel in a folder: what each needs comes along, whatever way they are packed."""

from __future__ import annotations

import gzip
import lzma

import pytest

from hvmgr import errors
from hvmgr.storage import kernel_modules


@pytest.fixture
def tree(tmp_path):
    """A folder with a module, what it needs in two steps, and one that nobody asks for."""
    folder = tmp_path / "6.1"
    (folder / "kernel" / "net").mkdir(parents=True)
    card = b"\0alias=pci:v00001AF4d*\0alias=virtio:d1v*\0firmware=card/x.bin\0depends=bus-x\0"
    (folder / "kernel" / "net" / "card-1.ko.xz").write_bytes(lzma.compress(card))
    (folder / "kernel" / "bus-x.ko.gz").write_bytes(gzip.compress(b"bus"))
    (folder / "kernel" / "ring.ko").write_bytes(b"ring")
    (folder / "kernel" / "other.ko").write_bytes(b"other")
    (folder / "modules.dep").write_text(
        "kernel/net/card-1.ko.xz: kernel/bus-x.ko.gz kernel/ring.ko\nkernel/bus-x.ko.gz: kernel/ring.ko\n"
        "kernel/ring.ko:\nkernel/other.ko:\n"
    )
    return folder


def test_module_comes_with_all_that_it_needs(tree):
    found = {
        one.name: one for one in kernel_modules.of_folder(tree).chosen(lambda path: path.startswith("kernel/net/"))
    }
    assert set(found) == {"card_1", "bus_x", "ring"}
    card = found["card_1"]
    assert card.needs == ("bus_x", "ring")
    assert card.aliases == ("pci:v00001AF4d*", "virtio:d1v*")
    assert card.firmware == ("card/x.bin",)
    assert (found["bus_x"].data, found["bus_x"].needs) == (b"bus", ("ring",))


def test_modules_load_behind_what_they_need(tree):
    (tree / "modules.builtin").write_text("kernel/ext-4.ko\n")
    found = kernel_modules.of_folder(tree)
    ordered = found.in_order(("other", "ext_4", "card_1", "ring", "nothing"))
    assert [one.name for one in ordered] == ["other", "ring", "bus_x", "card_1"]
    assert (found.has("ext_4"), found.built_in) == (False, {"ext_4"})


def test_file_is_no_folder_of_modules(tree):
    with pytest.raises(errors.NotFound, match=r"no modules\.dep"):
        kernel_modules.of_folder(tree / "kernel" / "ring.ko")


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("kernel/net/card-1.ko.xz", b"no xz", errors.Corrupt),
        ("kernel/bus-x.ko.gz", gzip.compress(b"bus", mtime=0)[:-4], errors.Corrupt),
        ("kernel/ring.ko", None, errors.NotFound),
        ("modules.dep", None, errors.NotFound),
    ],
    ids=["xz", "gz", "missing", "no-list"],
)
def test_damaged_folder_is_one_sentence(tree, name, data, error):
    (tree / name).unlink()
    if data is not None:
        (tree / name).write_bytes(data)
    with pytest.raises(error):
        kernel_modules.of_folder(tree).chosen(lambda path: path.startswith("kernel/net/"))
