"""``export.yaml``: what is written is read, and what no export says is refused with its line."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.model import manifest
from hvmgr.model.manifest import (
    Disk,
    Extent,
    Image,
    Manifest,
    Network,
    Outside,
    SlotImage,
    Snapshot,
    Source,
    Used,
)
from hvmgr.model.metadata import SavedState

MOMENT = datetime(2026, 11, 21, 13, 3, 5, 123456, tzinfo=UTC)
TOP = "Snapshots/11111111-1111-4111-8111-111111111111/vda_22222222-2222-4222-8222-222222222222.qcow2"
BASE = "Virtual Hard Disks/vda.qcow2"

WHOLE = Manifest(
    vm_id="11111111-1111-4111-8111-111111111111",
    name="web",
    home="/var/lib/hvmgr/web",
    created=MOMENT,
    source=Source("0.1.0", "9.0.0", "7.2.22", "qemu:///system", "x86_64", "pc-q35-7.2", "kvm", "host-model"),
    options=Used(Extent.KEPT, disks=True, state=False, excluded=("vdb", "no"), format="vhd"),
    state=SavedState.RUNNING,
    present=(SlotImage("vda", TOP),),
    disks=(Disk("vda", "33333333-3333-4333-8333-333333333333", 4 << 30, "/var/lib/hvmgr/web/x.qcow2"),),
    snapshots=(Snapshot("4" * 8, "before: the 'update'", MOMENT, None, SavedState.PAUSED, (SlotImage("vda", BASE),)),),
    images=(
        Image(TOP, "qcow2", 4 << 30, 196624, "/a/b", BASE, "0" * 64),
        Image(BASE, "qcow2", 4 << 30, 17, "/a/c"),
    ),
    networks=(Network("52:54:00:12:34:56", "network", "default", None, "42"),),
    outside=(Outside("sda", "/iso/debian.iso"),),
)
TEXT = WHOLE.to_yaml()


def test_what_is_written_is_read():
    assert manifest.parse(TEXT, source="export.yaml") == WHOLE


def test_file_begins_with_what_it_is():
    assert TEXT.startswith("# An export of the VM web")
    assert "\nformat: 1\n" in TEXT


@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=40))
def test_any_name_comes_back(name):
    one = dataclasses.replace(WHOLE, snapshots=(dataclasses.replace(WHOLE.snapshots[0], name=name),))
    assert manifest.parse(one.to_yaml(), source="export.yaml") == one


@pytest.mark.parametrize("name", ["no", "123", "1:30", "null", "~", "- a", "#", "a: b", "'", '"', "\udc80", "\u2028"])
def test_name_that_yaml_could_take_for_more_comes_back(name):
    one = dataclasses.replace(WHOLE, name=name)
    assert manifest.parse(one.to_yaml(), source="export.yaml") == one


def test_chain_leads_down_to_the_base():
    assert [one.file for one in WHOLE.chain(TOP)] == [TOP, BASE]


def test_chain_with_a_missing_parent_is_corrupt():
    broken = dataclasses.replace(WHOLE, images=WHOLE.images[:1])
    with pytest.raises(errors.Corrupt, match="does not list the image Virtual Hard Disks"):
        broken.chain(TOP)


def test_chain_in_a_circle_is_corrupt():
    broken = dataclasses.replace(WHOLE, images=(WHOLE.images[0], dataclasses.replace(WHOLE.images[1], parent=TOP)))
    with pytest.raises(errors.Corrupt, match="runs in a circle"):
        broken.chain(TOP)


def test_newer_format_is_unsupported_whatever_else_it_says():
    text = TEXT.replace("format: 1\n", "format: 2\nmore: of it\n", 1)
    with pytest.raises(errors.Unsupported, match="written by a newer hvmgr"):
        manifest.parse(text, source="export.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param("format: 1\n", "format: 0\n", "line 2, format: '0' is not a whole number", id="format-0"),
        pytest.param("state: running", "state: asleep", "line 8, vm.state: 'asleep' is unknown", id="state"),
        pytest.param("name: web", "nam: web", "unknown key 'nam'", id="typing-error"),
        pytest.param(f"image: {BASE}", "image: ../../etc/passwd", "no plain name", id="leads-out"),
        pytest.param(f"image: {BASE}", "image: /etc/passwd", "no plain name", id="absolute"),
        pytest.param(f"image: {BASE}", "image: a/../b", "no plain name", id="dots-inside"),
        pytest.param(f"image: {BASE}", "image: a//b", "no plain name", id="doubled-slash"),
        pytest.param(f"image: {BASE}", "image: .", "no plain name", id="folder-itself"),
        pytest.param("sha256: '" + "0" * 64 + "'", "sha256: abc", "is no SHA-256", id="hash"),
        pytest.param("bytes: 17", "bytes: -1", "not a whole number", id="negative"),
        pytest.param("created: '2026", "created: 'x2026", "is no time", id="time"),
        pytest.param("vm:\n", "vm: &a\n", "anchors and aliases", id="anchor"),
    ],
)
def test_what_no_export_says_is_corrupt_with_its_line(old, new, said):
    assert old in TEXT
    with pytest.raises(errors.Corrupt, match="line ") as caught:
        manifest.parse(TEXT.replace(old, new, 1), source="export.yaml")
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "42", "format: 1", "\0", "format: [1", "a: b: c"])
def test_garbage_is_corrupt(text):
    with pytest.raises(errors.Corrupt):
        manifest.parse(text, source="export.yaml")
