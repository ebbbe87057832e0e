"""Every row of the table of faults, planted into tiny images and found again."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd import checking
from hvmgr.vhd.rules import Severity
from tests.vhd import planted
from tests.vhd.planted import ALL, BAT, BLOCK, FREE, HEADER, MACX, PARENT_UID, SIZE, W2RU, Planted

W, R, E = Severity.WARNING, Severity.REPAIRABLE, Severity.ERROR
HALF = b"\xf0" + bytes(511)  # the first four sectors of a block
LOCATOR = 576  # of the first one, in the header


def full(**more):
    return planted.sparse(**more)


def child(**more):
    return planted.sparse(parent="parent.vhd", **more)


def u8(*values):
    return bytes(values)


def u16(value):
    return struct.pack(">H", value)


def u32(value):
    return struct.pack(">I", value)


def u64(value):
    return struct.pack(">Q", value)


def now(offset=0):
    return u32(int(time.time()) - 946_684_800 + offset)


def locator(code=b"W2ru", space=512, length=24, reserved=0, offset=W2RU):
    return struct.pack(">4sIIIQ", code, space, length, reserved, offset)


def both_footers(offset, data):
    return lambda made: made.footers(offset, data)


def in_header(offset, data):
    return lambda made: made.header(offset, data)


def raw(offset, data):
    return lambda made: made.put(offset, data)


def closing(offset, data):
    return lambda made: made.put(made.end + offset, data)


def in_bat(number, sector):
    return lambda made: made.entry(number, sector)


def appended(data):
    def plant(made):
        made.data += data

    return plant


def cut(count):
    def plant(made):
        del made.data[len(made.data) - count :]

    return plant


def cut_to(length):
    def plant(made):
        del made.data[length:]

    return plant


def block_of(number, other):
    return lambda made: made.entry(number, made.blocks[other] // 512)


def sealed_copy(offset, data):
    def plant(made):
        made.put(offset, data)
        planted.seal(made.data, 0, 512, 64)

    return plant


def text(offset, data):
    """Another text of the first locator, as long as it is."""

    def plant(made):
        made.put(offset, data)
        made.header(LOCATOR, locator(length=len(data)))

    return plant


def moved_bat(offset):
    return in_header(16, u64(offset))


def last_block_short(made):
    """The file ends behind the part of the last block that lies in the disk."""
    last = made.blocks[15] + 512 + BLOCK - 512
    made.data[last:] = made.data[made.end :]


def batmap(made):
    """A XenServer image with a batmap behind the BAT, and a block in it."""
    footer_ = bytearray(made.data[made.end :])
    footer_[28:36] = b"tap\0" + u32(0x10003)
    planted.seal(footer_, 0, 512, 64)
    end_of_bat = BAT + 512
    header_ = struct.pack(">8sQIIIB", b"tdbatmap", end_of_bat + 512, 1, 0x10002, 0xFFFFFFFF, 0)
    made.data[end_of_bat : end_of_bat + 1024] = header_.ljust(512, b"\0") + bytes(512)
    made.put(0, bytes(footer_))
    made.put(made.end, bytes(footer_))
    for number in made.blocks:
        made.entry(number, FREE)
    made.entry(1, (end_of_bat + 512) // 512)


def zero_filled(made):
    for number in made.blocks:
        made.put(made.blocks[number] + 512, bytes(BLOCK))


# --- one file: what is planted, in what, and what has to be found ----------------------------------------------------

FAULTS = [
    pytest.param(full, cut_to(1536), {"F1": E}, id="F1-shorter-than-its-header"),
    pytest.param(full, cut_to(0), {"F1": E}, id="F1-empty"),
    pytest.param(full, appended(b"12345"), {"F2": E, "F3": R}, id="F2-no-whole-sectors"),
    pytest.param(full, cut(1), {"F2": W}, id="F2-old-short-footer"),
    pytest.param(full, appended(bytes(512)), {"F3": R}, id="F3-trailing-sector"),
    pytest.param(full, cut(512), {"F3": R}, id="F3-no-footer"),
    pytest.param(full, cut(1024), {"F3": E}, id="F3-a-block-is-cut"),
    pytest.param(full, closing(300, b"x"), {"F4": R}, id="F4-end-checksum"),
    pytest.param(full, raw(300, b"x"), {"F5": R}, id="F5-copy-checksum"),
    pytest.param(full, raw(0, b"K"), {"F5": R}, id="F5-copy-cookie"),
    pytest.param(full, lambda m: (raw(64, b"x")(m), closing(64, b"x")(m)), {"F6": R}, id="F6-both-checksums-alike"),
    pytest.param(full, lambda m: (raw(64, b"x")(m), closing(65, b"x")(m)), {"F6": E}, id="F6-both-in-two-ways"),
    pytest.param(planted.fixed, closing(64, b"x"), {"F6": E}, id="F6-fixed-has-only-one"),
    pytest.param(full, sealed_copy(68, b"another id here!"), {"F7": R}, id="F7-two-good-ones"),
    pytest.param(full, both_footers(8, u32(0)), {"F8": E}, id="F8-bit-missing"),
    pytest.param(full, both_footers(8, u32(6)), {"F8": E}, id="F8-unknown-bit"),
    pytest.param(full, both_footers(12, u32(0x20000)), {"F9": E}, id="F9-version"),
    pytest.param(full, both_footers(60, u32(5)), {"F10": E}, id="F10-type"),
    pytest.param(planted.fixed, both_footers(16, u64(0)), {"F11": E}, id="F11-fixed-with-an-offset"),
    pytest.param(planted.fixed, both_footers(16, u64(0xFFFFFFFF)), {"F11": W}, id="F11-32-ones"),
    pytest.param(planted.fixed, both_footers(48, u64(SIZE - 512)), {"F12": E}, id="F12-fixed-of-another-length"),
    pytest.param(full, both_footers(16, u64(100)), {"F13": E}, id="F13-within-the-footer"),
    pytest.param(full, both_footers(16, u64(513)), {"F13": E}, id="F13-unaligned"),
    pytest.param(full, both_footers(16, u64(1 << 40)), {"F13": E}, id="F13-outside"),
    pytest.param(full, both_footers(16, u64((1 << 64) - 512)), {"F13": E}, id="F13-far-outside"),
    pytest.param(full, both_footers(48, u64(0)), {"F14": E, "F16": W}, id="F14-size-0"),
    pytest.param(full, both_footers(48, u64(SIZE - 1)), {"F14": E}, id="F14-odd-size"),
    pytest.param(full, both_footers(48, u64(2041 << 30)), {"F14": E}, id="F14-too-large"),
    pytest.param(full, both_footers(24, now(7200)), {"F15": W}, id="F15-made-tomorrow"),
    pytest.param(child, in_header(56, now(7200)), {"F15": W}, id="F15-parent-of-tomorrow"),
    pytest.param(full, both_footers(24, now(600)), {}, id="F15-clocks-may-differ"),
    pytest.param(full, both_footers(56, u16(120) + u8(4, 17)), {"F16": W}, id="F16-geometry"),
    pytest.param(full, both_footers(56, u16(65535) + u8(16, 255)), {}, id="F16-not-said"),
    pytest.param(full, both_footers(84, u8(2)), {"F17": E}, id="F17-saved-state-2"),
    pytest.param(full, both_footers(84, u8(1)), {"F17": W}, id="F17-saved"),
    pytest.param(full, both_footers(85, u8(7)), {"F18": W}, id="F18-hidden-7"),
    pytest.param(full, both_footers(85, u8(1)), {}, id="F18-hidden"),
    pytest.param(full, both_footers(90, b"x"), {"F19": W}, id="F19-footer"),
    pytest.param(full, in_header(900, b"x"), {"F19": W}, id="F19-header"),
    pytest.param(full, in_header(63, b"x"), {"F19": W}, id="F19-header-word"),
    pytest.param(full, both_footers(68, bytes(16)), {"F20": W}, id="F20-no-id"),
    pytest.param(full, in_header(0, b"X"), {"F21": E}, id="F21-header-cookie"),
    pytest.param(full, raw(HEADER + 36, b"x"), {"F22": E}, id="F22-header-checksum"),
    pytest.param(full, in_header(24, u32(0x20000)), {"F23": E}, id="F23-header-version"),
    pytest.param(full, in_header(8, u64(0)), {"F24": W}, id="F24-next-offset"),
    pytest.param(full, moved_bat(0), {"F25": E}, id="F25-bat-0"),
    pytest.param(full, moved_bat(BAT + 1), {"F25": E}, id="F25-unaligned"),
    pytest.param(full, moved_bat(HEADER), {"F25": E}, id="F25-over-the-header"),
    pytest.param(full, moved_bat(1 << 50), {"F25": E}, id="F25-behind-the-footer"),
    pytest.param(full, in_header(28, u32(0x40000000)), {"F29": E, "F32": W}, id="F29-table-as-long-as-the-file"),
    pytest.param(full, in_header(32, u32(3000)), {"F26": E}, id="F26-no-power-of-two"),
    pytest.param(full, in_header(32, u32(256)), {"F26": E}, id="F26-below-a-sector"),
    pytest.param(full, in_header(28, u32(15)), {"F27": E}, id="F27-too-few-entries"),
    pytest.param(full, in_header(28, u32(20)), {}, id="F27-more-entries"),
    pytest.param(full, in_header(64, "p".encode("utf-16-be")), {"F28": W}, id="F28-name"),
    pytest.param(full, in_header(40, PARENT_UID), {"F28": W}, id="F28-id"),
    pytest.param(full, in_header(56, u32(1)), {"F28": W}, id="F28-time"),
    pytest.param(full, in_bat(1, 1), {"F29": E}, id="F29-header"),
    pytest.param(full, in_bat(1, 0), {"F29": E}, id="F29-copy-of-the-footer"),
    pytest.param(full, in_bat(1, BAT // 512), {"F29": E}, id="F29-bat"),
    pytest.param(child, in_bat(1, MACX // 512), {"F29": E, "F37": E}, id="F29-locator"),
    pytest.param(full, batmap, {"F29": E}, id="F29-batmap"),
    pytest.param(full, in_bat(3, 1 << 30), {"F30": E}, id="F30-far-behind"),
    pytest.param(full, last_block_short, {"F30": W}, id="F30-only-what-is-behind-the-disk"),
    pytest.param(full, block_of(3, 1), {"F31": E}, id="F31-equal"),
    pytest.param(full, lambda m: m.entry(3, m.blocks[1] // 512 + 2), {"F31": E}, id="F31-overlapping"),
    pytest.param(full, lambda m: (in_header(28, u32(20))(m), block_of(17, 2)(m)), {"F32": W}, id="F32"),
    pytest.param(
        lambda: full(blocks={1: (HALF, b"y" * BLOCK), 2: (ALL, b"z" * BLOCK)}), raw(0, b""), {"F33": R}, id="F33"
    ),
    pytest.param(
        lambda: full(blocks={1: (bytes(512), bytes(BLOCK - 1) + b"y")}), raw(0, b""), {"F33": R}, id="F33-last-byte"
    ),
    pytest.param(lambda: full(blocks={1: (HALF, b"y" * 2048 + bytes(2048))}), raw(0, b""), {}, id="F33-zeros"),
    pytest.param(lambda: full(blocks={15: (ALL, bytes(BLOCK))}), raw(0, b""), {"F34": W}, id="F34"),
    pytest.param(child, in_header(LOCATOR, locator(offset=1 << 40)), {"F35": E}, id="F35-outside"),
    pytest.param(child, in_header(LOCATOR, locator(length=0)), {"F35": E}, id="F35-no-text"),
    pytest.param(child, in_header(LOCATOR, locator(length=514)), {"F35": E}, id="F35-above-its-space"),
    pytest.param(child, in_header(LOCATOR, locator(offset=0)), {"F35": E}, id="F35-offset-0"),
    pytest.param(child, in_header(LOCATOR, locator(reserved=1)), {"F35": E}, id="F35-reserved"),
    pytest.param(child, in_header(LOCATOR, locator(space=1000)), {"F35": E}, id="F35-space"),
    pytest.param(child, in_header(LOCATOR, locator(code=b"Abcd")), {"F36": W}, id="F36-unknown"),
    pytest.param(child, in_header(LOCATOR + 24, locator()), {"F36": E}, id="F36-twice"),
    pytest.param(child, in_header(LOCATOR, locator(offset=HEADER)), {"F37": E, "F38": W}, id="F37-header"),
    pytest.param(child, in_header(LOCATOR, locator(offset=BAT)), {"F37": E, "F38": W}, id="F37-bat"),
    pytest.param(
        child, lambda m: m.header(LOCATOR, locator(offset=m.blocks[2])), {"F37": E, "F39": W, "F40": W}, id="F37-block"
    ),
    pytest.param(child, in_header(LOCATOR, locator(length=23)), {"F38": W}, id="F38-odd"),
    pytest.param(child, text(W2RU, ".\\a\0b".encode("utf-16-le")), {"F38": W}, id="F38-nul"),
    pytest.param(child, text(W2RU, ".\\".encode("utf-16-le") + b"\x00\xd8"), {"F38": W}, id="F38-surrogate"),
    pytest.param(child, text(W2RU, "parent.vhd".encode("utf-16-le")), {"F39": W}, id="F39-no-dot"),
    pytest.param(child, text(W2RU, "C:\\parent.vhd".encode("utf-16-le")), {"F39": W}, id="F39-absolute"),
    pytest.param(child, text(W2RU, ".\\other.vhd".encode("utf-16-le")), {"F40": W}, id="F40"),
    pytest.param(child, in_header(LOCATOR, bytes(48)), {"F41": W}, id="F41"),
    pytest.param(child, in_header(40, bytes(16)), {"F45": W}, id="F45"),
    pytest.param(full, both_footers(28, b"tap\0" + u32(1)), {"F50": E}, id="F50-tap-0.1"),
]


@pytest.mark.parametrize(("make", "plant", "expected"), FAULTS)
def test_planted_fault_is_found(tmp_path: Path, make, plant, expected) -> None:
    made = make()
    tidy(made, keep="F34" in expected)
    plant(made)
    path = tmp_path / "disk.vhd"
    path.write_bytes(made.data)
    found = checking.check(path)
    assert {fault.code: fault.severity for fault in found} == expected
    for fault in found:
        assert fault.text
        assert fault.offset is None or fault.offset >= 0
        assert path.read_bytes() == made.data, "a check writes nothing"


def tidy(made: Planted, *, keep: bool) -> None:
    """The bits of the last block that are behind the disk's end are clear, and so is the data there."""
    if 15 in made.blocks and not keep:
        made.put(made.blocks[15], b"\xfe")
        made.put(made.blocks[15] + 512 + BLOCK - 512, bytes(512))


@pytest.mark.parametrize("make", [full, child, planted.fixed], ids=["dynamic", "differencing", "fixed"])
def test_sound_image_has_no_fault(tmp_path: Path, make) -> None:
    made = make()
    tidy(made, keep=False)
    path = tmp_path / "disk.vhd"
    path.write_bytes(made.data)
    assert checking.check(path) == []


# --- chains -----------------------------------------------------------------------------------------------------------


def family(folder: Path, depth: int = 2) -> list[tuple[Path, Planted]]:
    """The base first: base.vhd, 1.avhd, 2.avhd; each child knows its parent's id, and no time."""
    made = []
    for number in range(depth + 1):
        name = f"{number}.avhd" if number else "base.vhd"
        image = planted.sparse(parent=made[-1][0].name if made else None, uid=bytes([number + 1] * 16))
        tidy(image, keep=False)
        if made:
            image.header(40, bytes([number] * 16))
        path = folder / name
        path.write_bytes(image.data)
        made.append((path, image))
    return made


def change(of: tuple[Path, Planted], plant) -> None:
    path, made = of
    plant(made)
    path.write_bytes(made.data)


def shrink(made: Planted) -> None:
    made.footers(48, u64(SIZE - 512))


CHAIN_FAULTS = [
    pytest.param(lambda f: f[1][0].unlink(), {("2.avhd", "F42"): E}, id="F42-not-there"),
    pytest.param(
        lambda f: change(f[0], both_footers(68, b"x" * 16)), {("1.avhd", "F42"): E}, id="F42-beside-it-has-another-id"
    ),
    pytest.param(lambda f: change(f[2], in_header(56, u32(77))), {("2.avhd", "F44"): W}, id="F44-time"),
    pytest.param(lambda f: change(f[2], in_header(40, bytes(16))), {("2.avhd", "F45"): E}, id="F45-no-id"),
    pytest.param(lambda f: change(f[0], shrink), {("1.avhd", "F46"): E, ("base.vhd", "F34"): W}, id="F46-size"),
    pytest.param(
        lambda f: change(f[0], closing(300, b"x")),
        {("base.vhd", "F4"): R, ("1.avhd", "F48"): E},
        id="F48-parent-damaged",
    ),
    pytest.param(
        lambda f: change(f[0], lambda made: made.entry(1, 1)),
        {("base.vhd", "F29"): E, ("1.avhd", "F48"): E},
        id="F48-parent-corrupt",
    ),
    pytest.param(lambda f: change(f[0], both_footers(85, u8(7))), {("base.vhd", "F18"): W}, id="F48-only-a-warning"),
]


@pytest.mark.parametrize(("damage", "expected"), CHAIN_FAULTS)
def test_planted_fault_of_a_chain_is_found(tmp_path: Path, damage, expected) -> None:
    chain = family(tmp_path)
    assert checking.check(chain[-1][0], chain=True) == []
    damage(chain)
    found = checking.check(chain[-1][0], chain=True)
    assert {(fault.path.name, fault.code): fault.severity for fault in found} == expected


def test_time_of_the_parent_may_be_its_change(tmp_path: Path) -> None:
    chain = family(tmp_path)
    os.utime(chain[1][0], (946_684_800 + 77, 946_684_800 + 77))
    change(chain[2], in_header(56, u32(77)))
    assert checking.check(chain[2][0], chain=True) == []
    change(chain[2], in_header(56, u32(99)))
    found = checking.check(chain[2][0], chain=True, strict=True)
    assert [(fault.code, fault.severity, fault.answer) for fault in found] == [("F44", E, errors.Conflict)]


def test_named_parent_with_another_id(tmp_path: Path) -> None:
    chain = family(tmp_path)
    found = checking.check(chain[2][0], chain=True, parent=chain[0][0])
    assert [(fault.code, fault.answer) for fault in found] == [("F43", errors.Conflict)]


def test_parent_that_is_no_vhd(tmp_path: Path) -> None:
    chain = family(tmp_path)
    raw_disk = tmp_path / "disk.raw"
    raw_disk.write_bytes(bytes(SIZE))
    found = checking.check(chain[1][0], chain=True, parent=raw_disk)
    assert [fault.code for fault in found] == ["F48"]


def test_parent_without_an_id(tmp_path: Path) -> None:
    """It can only be named; as a parent it is an error, alone a warning."""
    chain = family(tmp_path, depth=1)
    change(chain[0], both_footers(68, bytes(16)))
    assert {fault.code for fault in checking.check(chain[1][0], chain=True)} == {"F42"}
    change(chain[1], in_header(40, bytes(16)))
    found = checking.check(chain[1][0], chain=True, parent=chain[0][0])
    assert {(fault.path.name, fault.code, fault.severity) for fault in found} >= {("base.vhd", "F20", E)}


def test_chain_that_comes_back_to_itself(tmp_path: Path) -> None:
    chain = family(tmp_path)
    looped = planted.sparse(parent="2.avhd", uid=b"\x01" * 16)
    tidy(looped, keep=False)
    looped.header(40, b"\x03" * 16)
    chain[0][0].write_bytes(looped.data)
    found = checking.check(chain[2][0], chain=True)
    assert [(fault.path.name, fault.code) for fault in found] == [("2.avhd", "F47")]


def test_two_files_can_be_the_parent(tmp_path: Path) -> None:
    chain = family(tmp_path, depth=1)
    folder = tmp_path / "store"
    folder.mkdir()
    for name in ("one.vhd", "two.vhd"):
        (folder / name).write_bytes(chain[0][1].data)
    chain[0][0].unlink()
    found = checking.check(chain[1][0], chain=True, folders=[folder])
    assert [fault.code for fault in found] == ["F49"]
    assert "one.vhd" in found[0].text


def test_split_image_is_not_read(tmp_path: Path) -> None:
    made = full()
    tidy(made, keep=False)
    (tmp_path / "disk.vhd").write_bytes(made.data)
    (tmp_path / "disk.v01").write_bytes(b"more")
    assert [fault.code for fault in checking.check(tmp_path / "disk.vhd")] == ["F50"]
