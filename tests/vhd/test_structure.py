"""Every fault that a file's own structures can have: planted, found, and answered as the table of rules says."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.vhd import structure
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create
from hvmgr.vhd.file import File
from hvmgr.vhd.format import NOWHERE, Footer, Header, Kind, Locator
from hvmgr.vhd.image import open_image
from hvmgr.vhd.rules import RULES, Severity
from tests.vhd.disks import KIB, MIB, STEADY, content

SIZE = 2 * MIB + 512 * KIB + 512  # six blocks of 512 KiB, the last of them one sector


class Draft:
    """A VHD in memory, to be spoilt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())

    def footer(self, where: str = "both", **values) -> None:
        """Fields of the footers, with right sums."""
        end = len(self.data) - 512
        for at in {"start": [0], "end": [end], "both": [0, end]}[where]:
            if self.data[at : at + 8] == b"conectix":
                self.data[at : at + 512] = replace(Footer.unpack(self.data[at : at + 512]), **values).pack()

    def header(self, **values) -> None:
        self.data[512:1536] = replace(Header.unpack(self.data[512:1536]), **values).pack()

    def read_header(self) -> Header:
        return Header.unpack(self.data[512:1536])

    def locator(self, number: int, **values) -> None:
        locators = list(self.read_header().locators)
        locators[number] = replace(locators[number], **values)
        self.header(locators=tuple(locators))

    def text(self, number: int, data: bytes) -> None:
        one = self.read_header().locators[number]
        self.data[one.offset : one.offset + one.space] = data.ljust(one.space, b"\0")
        self.locator(number, length=len(data))

    def entry(self, block: int, sector: int | None = None) -> int:
        at = self.read_header().table_offset + 4 * block
        if sector is not None:
            self.data[at : at + 4] = struct.pack(">I", sector)
        return struct.unpack_from(">I", self.data, at)[0]

    def faults(self):
        self.path.write_bytes(self.data)
        file = File(self.path)
        try:
            return structure.read(file).faults
        finally:
            file.close()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One disk of each kind; the dynamic and the differencing one hold blocks 0, 2 and 5."""
    folder = tmp_path_factory.mktemp("originals")
    create(folder / "fixed.vhd", SIZE, kind=Kind.FIXED)
    create(folder / "dynamic.vhd", SIZE, block_size=512 * KIB)
    create(folder / "differencing.vhd", parent=folder / "dynamic.vhd")
    for name in ("dynamic", "differencing"):
        with open_chain(folder / f"{name}.vhd", writable=True) as disk:
            for block in (0, 2, 5):
                disk.write(block * 512 * KIB, b"x" * 512)
    return folder


@pytest.fixture
def draft(originals, tmp_path):
    def make(kind: str) -> Draft:
        (tmp_path / f"{kind}.vhd").write_bytes((originals / f"{kind}.vhd").read_bytes())
        return Draft(tmp_path / f"{kind}.vhd")

    return make


def cut(count: int):
    def do(one: Draft) -> None:
        del one.data[len(one.data) - count :]

    return do


def append(data: bytes):
    return lambda one: one.data.extend(data)


def poke(at: int, data: bytes):
    def do(one: Draft) -> None:
        place = at % len(one.data)
        one.data[place : place + len(data)] = data

    return do


def last_block_cut(one: Draft) -> None:
    """The last block ends where the disk does, as some writers leave it."""
    footer = one.data[-512:]
    end = one.entry(5) * 512 + 512 + 512
    del one.data[end:]
    one.data.extend(footer)


ERROR, REPAIRABLE, WARNING = Severity.ERROR, Severity.REPAIRABLE, Severity.WARNING
PLANTED = [
    ("F1", "dynamic", ERROR, lambda one: one.data.__delitem__(slice(700, None))),
    ("F1", "dynamic", ERROR, lambda one: one.data.__delitem__(slice(1536, -512))),
    ("F2", "dynamic", ERROR, append(b"\0" * 100)),
    ("F3", "dynamic", REPAIRABLE, cut(512)),
    ("F3", "dynamic", REPAIRABLE, append(bytes(4096))),
    ("F3", "dynamic", ERROR, cut(4096)),
    ("F3", "fixed", ERROR, cut(512)),
    ("F4", "dynamic", REPAIRABLE, poke(-512 + 64, b"\0\0")),
    ("F5", "dynamic", REPAIRABLE, poke(64, b"\0\0")),
    ("F5", "dynamic", REPAIRABLE, poke(0, b"xx")),
    ("F6", "dynamic", REPAIRABLE, lambda one: [poke(64, b"\0\0")(one), poke(-512 + 64, b"\0\0")(one)]),
    ("F6", "fixed", ERROR, poke(-512 + 64, b"\0\0")),
    ("F7", "dynamic", REPAIRABLE, lambda one: one.footer("end", time=77)),
    ("F8", "dynamic", ERROR, lambda one: one.footer(features=0)),
    ("F8", "dynamic", ERROR, lambda one: one.footer(features=6)),
    ("F9", "dynamic", ERROR, lambda one: one.footer(version=0x20000)),
    ("F10", "dynamic", ERROR, lambda one: one.footer(type=6)),
    ("F11", "fixed", ERROR, lambda one: one.footer(data_offset=512)),
    ("F11", "fixed", WARNING, lambda one: one.footer(data_offset=0xFFFFFFFF)),
    ("F12", "fixed", ERROR, lambda one: one.footer(size=SIZE - 512)),
    ("F13", "dynamic", ERROR, lambda one: one.footer(data_offset=100)),
    ("F13", "dynamic", ERROR, lambda one: one.footer(data_offset=1 << 40)),
    ("F14", "dynamic", ERROR, lambda one: one.footer(size=0)),
    ("F14", "dynamic", ERROR, lambda one: one.footer(size=SIZE + 1)),
    ("F14", "dynamic", ERROR, lambda one: one.footer(size=1 << 42)),
    ("F15", "dynamic", WARNING, lambda one: one.footer(time=0xFFFFFFFF)),
    ("F15", "differencing", WARNING, lambda one: one.header(parent_time=0xFFFFFFFF)),
    ("F16", "dynamic", WARNING, lambda one: one.footer(geometry=structure.format.Geometry(900, 16, 63))),
    ("F17", "dynamic", ERROR, lambda one: one.footer(saved_state=2)),
    ("F17", "dynamic", WARNING, lambda one: one.footer(saved_state=1)),
    ("F18", "dynamic", WARNING, lambda one: one.footer(hidden=9)),
    ("F19", "dynamic", WARNING, lambda one: one.footer(reserved=b"x" * 426)),
    ("F19", "dynamic", WARNING, lambda one: one.header(reserved=b"x" * 256)),
    ("F20", "dynamic", WARNING, lambda one: one.footer(uid=bytes(16))),
    ("F21", "dynamic", ERROR, lambda one: one.header(cookie=b"cxsparsE")),
    ("F22", "dynamic", ERROR, poke(512 + 36, b"\0\0")),
    ("F23", "dynamic", ERROR, lambda one: one.header(version=0x20000)),
    ("F24", "dynamic", WARNING, lambda one: one.header(next_offset=0)),
    ("F25", "dynamic", ERROR, lambda one: one.header(table_offset=0)),
    ("F25", "dynamic", ERROR, lambda one: one.header(table_offset=1024)),
    ("F25", "dynamic", ERROR, lambda one: one.header(table_offset=1537)),
    ("F25", "dynamic", ERROR, lambda one: one.header(table_offset=NOWHERE)),
    ("F26", "dynamic", ERROR, lambda one: one.header(block_size=3 * 512)),
    ("F26", "dynamic", ERROR, lambda one: one.header(block_size=0)),
    ("F26", "dynamic", ERROR, lambda one: one.header(block_size=256)),
    ("F27", "dynamic", ERROR, lambda one: one.header(entries=5)),
    ("F28", "dynamic", WARNING, lambda one: one.header(parent_uid=b"p" * 16)),
    ("F29", "dynamic", ERROR, lambda one: one.entry(1, 2)),
    ("F30", "dynamic", ERROR, lambda one: one.entry(1, len(one.data) // 512 - 5)),
    ("F30", "dynamic", WARNING, last_block_cut),
    ("F31", "dynamic", ERROR, lambda one: one.entry(1, one.entry(0))),
    ("F31", "dynamic", ERROR, lambda one: one.entry(1, one.entry(0) + 3)),
    ("F32", "dynamic", WARNING, lambda one: [one.header(entries=9), one.entry(7, one.entry(0))]),
    ("F35", "differencing", ERROR, lambda one: one.locator(0, offset=0)),
    ("F35", "differencing", ERROR, lambda one: one.locator(0, offset=1 << 50)),
    ("F35", "differencing", ERROR, lambda one: one.locator(0, length=0)),
    ("F35", "differencing", ERROR, lambda one: one.locator(0, length=600)),
    ("F35", "differencing", ERROR, lambda one: one.locator(0, space=513)),
    ("F35", "differencing", ERROR, lambda one: one.locator(0, reserved=1)),
    ("F35", "differencing", ERROR, lambda one: one.locator(5, length=1)),
    ("F36", "differencing", ERROR, lambda one: one.locator(1, code=b"W2ru")),
    ("F36", "differencing", WARNING, lambda one: one.locator(1, code=b"Xyz1")),
    ("F37", "differencing", ERROR, lambda one: one.locator(0, offset=512)),
    ("F37", "differencing", ERROR, lambda one: one.locator(0, offset=one.entry(0) * 512)),
    ("F38", "differencing", WARNING, lambda one: one.text(0, b"abc")),
    ("F38", "differencing", WARNING, lambda one: one.text(0, b"a\0\0\0b\0")),
    ("F38", "differencing", WARNING, lambda one: one.text(0, b"\0\xd8a\0")),
    ("F39", "differencing", WARNING, lambda one: one.text(0, "C:\\dynamic.vhd".encode("utf-16-le"))),
    ("F40", "differencing", WARNING, lambda one: one.text(0, ".\\other.vhd".encode("utf-16-le"))),
    ("F41", "differencing", WARNING, lambda one: one.header(locators=(Locator(),) * 8)),
    ("F45", "differencing", WARNING, lambda one: one.header(parent_uid=bytes(16))),
    ("F50", "dynamic", ERROR, lambda one: one.footer(creator=b"tap\0", creator_version=1)),
]


@pytest.mark.parametrize(("code", "kind", "severity", "spoil"), PLANTED, ids=lambda value: str(value)[:12])
def test_planted_fault_is_found(draft, code: str, kind: str, severity: Severity, spoil) -> None:
    one = draft(kind)
    assert one.faults() == ()
    spoil(one)
    found = {fault.code: fault for fault in one.faults()}
    assert code in found, found
    assert found[code].severity is severity
    assert str(one.path) not in found[code].text
    assert found[code].describe().startswith(f"{code}: ")


@pytest.mark.parametrize(("code", "kind", "severity", "spoil"), PLANTED, ids=lambda value: str(value)[:12])
def test_planted_fault_is_answered(draft, code: str, kind: str, severity: Severity, spoil) -> None:
    one = draft(kind)
    spoil(one)
    faults = one.faults()
    before = one.path.read_bytes()
    if all(fault.severity is WARNING for fault in faults):
        with open_image(one.path) as image:
            assert image.size == SIZE
        return
    for options in ({}, {"writable": True}):
        with pytest.raises(errors.HvmgrError) as caught:
            open_image(one.path, **options)
        grave = [fault for fault in faults if fault.severity is not WARNING]
        assert type(caught.value) in {fault.answer for fault in grave}
        assert str(one.path) in caught.value.message
        assert caught.value.facts["fault"] in {fault.code for fault in grave}
    assert one.path.read_bytes() == before


@pytest.mark.parametrize("spoil", [cut(512), append(bytes(4096)), poke(-448, b"\0"), poke(64, b"\0")])
def test_disk_with_one_whole_footer_is_read_on_demand(draft, spoil) -> None:
    one = draft("dynamic")
    wanted = content(one.path)
    spoil(one)
    one.path.write_bytes(one.data)
    assert content(one.path, tolerant=True) == wanted


def test_old_footer_of_511_bytes(draft) -> None:
    one = draft("dynamic")
    wanted = content(one.path)
    cut(1)(one)
    assert one.faults() == ()
    assert content(one.path) == wanted
    with open_chain(one.path, writable=True) as disk:
        disk.write(512 * KIB, b"new block")
    data = one.path.read_bytes()
    assert len(data) % 512 == 0
    assert data[-512:] == data[:512]


def test_last_block_that_was_cut_is_read_and_written(draft) -> None:
    one = draft("dynamic")
    last_block_cut(one)
    one.path.write_bytes(one.data)
    wanted = bytearray(content(one.path))
    with open_chain(one.path, writable=True) as disk:
        disk.write(512 * KIB, b"y" * 512)
        disk.write(SIZE - 512, b"z" * 512)
    wanted[512 * KIB : 512 * KIB + 512], wanted[-512:] = b"y" * 512, b"z" * 512
    assert content(one.path) == wanted
    assert Draft(one.path).faults() == ()


def test_first_sector_of_a_fixed_disk_may_say_what_it_likes(draft) -> None:
    one = draft("fixed")
    one.data[:512] = Footer(size=SIZE, type=3, uid=b"guest's own disk").pack()
    assert one.faults() == ()
    assert structure.identify(one.path) is Kind.FIXED


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_kind_is_told_by_content_alone(draft, tmp_path: Path, kind: str) -> None:
    one = draft(kind)
    other = tmp_path / "no-suffix"
    other.write_bytes(one.data)
    assert structure.identify(other) == kind


@pytest.mark.parametrize("data", [b"", b"x", bytes(511), bytes(512), bytes(100_000), b"QFI\xfb" + bytes(70_000)])
def test_what_is_no_vhd(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "disk"
    path.write_bytes(data)
    assert structure.identify(path) is None
    with pytest.raises(errors.Corrupt, match=str(path)):
        open_image(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(errors.UsageError, match="file"):
            structure.identify(path)
    with pytest.raises(errors.NotFound, match="there is no"):
        structure.identify(tmp_path / "nothing")


def test_locator_in_sectors_and_areas_anywhere(draft) -> None:
    """The texts behind the blocks, their space in sectors, the table before them, the header elsewhere."""
    one = draft("differencing")
    header, footer = one.read_header(), one.data[-512:]
    del one.data[-512:]
    locators = []
    for old in header.locators[:2]:
        locators.append(replace(old, offset=len(one.data), space=2))
        one.data.extend(one.data[old.offset : old.offset + 512].ljust(1024, b"\0"))
    table = len(one.data)
    one.data.extend(one.data[header.table_offset : header.table_offset + 512])
    place = len(one.data)
    new = replace(header, table_offset=table, locators=(*locators, *header.locators[2:]))
    one.data.extend(new.pack() + footer)
    one.footer(data_offset=place)
    assert one.faults() == ()
    with open_image(one.path) as image:
        assert [text.text for text in image.structure.texts] == [".\\dynamic.vhd"] * 2
        assert [extent.offset for extent in image.extents() if extent.is_held] == [0, 2 * 512 * KIB, 5 * 512 * KIB]


@pytest.mark.parametrize("code", RULES)
def test_every_rule_has_a_sentence(code: str) -> None:
    assert RULES[code].sentence
    assert not RULES[code].sentence.endswith(".")


@STEADY
@given(data=st.data())
def test_any_damage_is_one_of_our_errors(originals, tmp_path_factory, data: st.DataObject) -> None:
    """Random bytes over the structures: a fault or none, but never a crash of ours."""
    kind = data.draw(st.sampled_from(["fixed", "dynamic", "differencing"]))
    path = tmp_path_factory.mktemp("damage") / "disk.vhd"
    content = bytearray((originals / f"{kind}.vhd").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 4096), st.integers(1, 512).map(lambda back: len(content) - back)))
        piece = data.draw(st.binary(min_size=1, max_size=9))
        content[at : at + len(piece)] = piece
    if data.draw(st.booleans()):
        for at in (0, len(content) - 512):
            if content[at : at + 8] == b"conectix":
                content[at : at + 512] = Footer.unpack(content[at : at + 512]).pack()
        content[512:1536] = Header.unpack(content[512:1536]).pack()
    path.write_bytes(content)
    structure.identify(path)
    for tolerant in (False, True):
        with contextlib.suppress(errors.HvmgrError), open_image(path, tolerant=tolerant) as image:
            if image.size < 64 * MIB:
                buffer = bytearray(image.size)
                image.read_into(0, memoryview(buffer))
    path.unlink()
