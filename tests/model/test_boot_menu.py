"""What is written into GRUB's files: only between our own lines, and in words that GRUB reads as they were meant."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest

from hvmgr import errors
from hvmgr.model import boot_entry, boot_menu, boot_windows
from hvmgr.model.boot_entry import BootEntry, ImageFile, Volume

OTHERS = "# by hand\nmenuentry 'Mine' {\n\ttrue\n}\n"
ENTRY = BootEntry(
    id="0123456789ab", title="Blue", image="/srv/VHD/os.vhd", kind="dynamic", size=1 << 30, volume="aaaa-bbbb",
    volume_type=Volume.EXT, files=(ImageFile("/VHD/os.vhd", 4096, 17, 2048, "ff"),), layer=True,
    kernel="/boot/vmlinuz-6.1.0-1-amd64", pinned=False, root="/dev/mapper/hvmgr-disk1", arguments="quiet", extra="",
    copied=False, added="2026-01-01T00:00:00Z",
)  # fmt: skip


def section(entry=ENTRY, **changes):
    return boot_menu.section(dataclasses.replace(entry, **changes), partition="msdos1", table=["9+8", "0+3"])


def test_entry_comes_back_as_it_was():
    text = boot_menu.with_section(OTHERS, ENTRY.id, section())
    assert boot_menu.entries(text) == (ENTRY,)
    assert boot_entry.named(boot_menu.entries(text), "Blue") == ENTRY


@pytest.mark.parametrize("others", ["", OTHERS, "# no end of line"])
def test_words_of_others_stay(others):
    text = boot_menu.with_default(boot_menu.with_section(others, ENTRY.id, section()), ENTRY.id)
    assert text.startswith(others)
    again = boot_menu.with_section(text, ENTRY.id, section(title="Other"))
    assert [one.title for one in boot_menu.entries(again)] == ["Other"]
    assert boot_menu.chosen(again) == ENTRY.id
    gone = boot_menu.without_section(again, ENTRY.id)
    assert gone.rstrip("\n") == others.rstrip("\n")


def test_default_gives_way_to_what_is_wanted_once():
    text = boot_menu.with_default(section(), ENTRY.id)
    assert 'if [ -z "$boot_once" ]; then\n\tset default="hvmgr-0123456789ab"\nfi\n' in text
    assert boot_menu.chosen(boot_menu.with_default(text, None)) is None


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(section().replace("### END hvmgr 0123456789ab ###\n", ""), id="no-end"),
        pytest.param(section().replace("### BEGIN hvmgr 0123456789ab ###\n", ""), id="no-begin"),
        pytest.param(section().replace("# facts:", "# fact:"), id="no-facts"),
        pytest.param(section().replace('# facts: {"', "# facts: {"), id="facts-broken"),
        pytest.param(section().replace('"copied": false, ', ""), id="facts-missing"),
    ],
)
def test_torn_menu_is_corrupt_and_never_rewritten(text):
    with pytest.raises(errors.Corrupt):
        boot_menu.entries(boot_menu.with_section(text, "ffff", section()))


def test_newer_entry_is_refused():
    with pytest.raises(errors.Unsupported, match="version 2"):
        boot_menu.entries(section().replace('"version": 1', '"version": 2'))


@pytest.mark.parametrize("title", ["it's", 'a "b" $c \\d', "grün; rm -rf {}"])
def test_grub_accepts_every_title_and_path(title, tmp_path, require_program):
    """grub-script-check is GRUB's own parser."""
    program = require_program("grub-script-check")
    file = ImageFile(f"/VHD/{title}.vhd", 1, 1, 0, "ff")
    text = section(title=title, files=(file,), arguments="a='b c' d")
    (tmp_path / "custom.cfg").write_text(boot_menu.with_default(text, ENTRY.id))
    told = subprocess.run([program, tmp_path / "custom.cfg"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")


def test_environment_is_one_that_grub_reads(tmp_path, require_program):
    program = require_program("grub-editenv")
    block = boot_menu.environment(None, "saved_entry", "0")
    block = boot_menu.environment(block, "next_entry", "hvmgr-1")
    block = boot_menu.environment(block, "next_entry", "hvmgr-2")
    (tmp_path / "grubenv").write_bytes(block)
    told = subprocess.run([program, tmp_path / "grubenv", "list"], capture_output=True, text=True, check=True)
    assert told.stdout == "saved_entry=0\nnext_entry=hvmgr-2\n"
    subprocess.run([program, tmp_path / "grubenv", "set", "mine=1"], check=True)
    assert b"mine=1\n" in boot_menu.environment((tmp_path / "grubenv").read_bytes(), "next_entry", None)


@pytest.mark.parametrize("block", [b"", b"x" * 1024, b"# GRUB Environment Block\n"])
def test_damaged_environment_is_left_alone(block):
    with pytest.raises(errors.Corrupt):
        boot_menu.environment(block, "next_entry", "hvmgr-1")


def test_full_environment_is_no_space():
    block = boot_menu.environment(None, "a", "b" * 900)
    with pytest.raises(errors.NoSpace):
        boot_menu.environment(block, "next_entry", "c" * 200)


@pytest.mark.parametrize(
    ("kind", "device"),
    [(boot_windows.Kind.PORTABLE, r"vhd=[locate]\VHD\os.vhd"), (boot_windows.Kind.QUALIFIED, r"vhd=[D:]\VHD\os.vhd")],
)
def test_script_for_windows_is_exact(kind, device):
    text = boot_windows.script("Blue", "/VHD/os.vhd", drive="d:", kind=kind)
    assert f'bcdedit /set %entry% device "{device}" || goto undo\r\n' in text
    assert f'bcdedit /set %entry% osdevice "{device}" || goto undo\r\n' in text
    assert "bcdedit /set %entry% detecthal on || goto undo\r\n" in text
    assert 'bcdedit /copy {current} /d "Blue"' in text
    assert text.replace("\r\n", "").isprintable()


@pytest.mark.parametrize("title", ['a"b', "50%", "a\nb", "x & y"])
def test_script_for_windows_refuses_what_it_cannot_hold(title):
    with pytest.raises(errors.UsageError):
        boot_windows.script(title, "/VHD/os.vhd")
