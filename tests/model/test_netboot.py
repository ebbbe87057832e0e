"""The texts for machines that start over the network, without a machine."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.model import netboot
from hvmgr.model.boot_map import SECTOR, Run
from hvmgr.model.netboot import How, NetbootOptions, Offer, System

_runs = st.lists(
    st.tuples(st.integers(1, 3000), st.one_of(st.none(), st.integers(0, 5))), min_size=1, max_size=12
)  # fmt: skip


def laid_out(pieces, seed):
    """Runs of a whole disk, whose data lies in the file in another order and with gaps; the file's length."""
    places, at = {}, 3
    order = [number for number, (_, gap) in enumerate(pieces) if gap is not None]
    random.Random(seed).shuffle(order)
    for number in order:
        length, gap = pieces[number]
        places[number] = at + gap
        at += gap + length
    runs, start = [], 0
    for number, (length, gap) in enumerate(pieces):
        runs.append(Run(start, length, None if gap is None else 0, places.get(number, 0)))
        start += length
    return runs, (at + 1) * SECTOR


@given(_runs, st.integers(0, 1000))
def test_map_says_of_each_sector_where_it_comes_from(pieces, seed):
    runs, length = laid_out(pieces, seed)
    found, at = {}, 0
    for line in netboot.disk_map(runs, length).splitlines():
        verb, *numbers = line.split()
        values = [int(one) // SECTOR for one in numbers]
        assert all(int(one) % SECTOR == 0 for one in numbers)
        if verb == "skip":
            at += values[0]
            continue
        start, count = values
        head = netboot.HEAD // SECTOR
        assert start >= head or start + count <= head
        for sector in range(count):
            assert start + sector not in found
            found[start + sector] = None if verb == "zero" else at + sector
        at += 0 if verb == "zero" else count
    assert found == {
        run.start + sector: None if run.level is None else run.place + sector
        for run in runs
        for sector in range(run.length)
    }


def test_map_of_a_file_that_is_shorter_is_refused():
    with pytest.raises(errors.Corrupt):
        netboot.disk_map([Run(0, 10, 0, 5)], 14 * SECTOR)


@pytest.mark.parametrize("url", ["http://10.0.2.2:8000", "http://[fd00::1]/a/b-c/", "http://deploy.example/~x/a%20b"])
def test_addresses_that_are_fit_for_a_script(url):
    netboot.require_options(NetbootOptions(url))


@pytest.mark.parametrize(
    "url",
    ["http://", "ftp://deploy/a", "http://deploy/a?b", "http://deploy/${x}", "http://deploy/a b", "http://deploy//a", "http://u:p@x/"],
)  # fmt: skip
def test_addresses_that_are_not(url):
    with pytest.raises(errors.UsageError, match="no address"):
        netboot.require_options(NetbootOptions(url))


OFFER = Offer("a", "g", "", How.NATIVE, "0" * 64)
SYSTEM = System("1" * 64, "2" * 64, "3" * 64)


def parts(options):
    """The script's lines by the label that they stand below."""
    found, label = {"": []}, ""
    for line in netboot.script([OFFER], options, SYSTEM).splitlines():
        if line.startswith(":"):
            label = line[1:]
            found[label] = []
        else:
            found[label].append(line)
    return found


def test_nobody_is_asked_where_nobody_is_to_choose():
    options = NetbootOptions("http://x/", default="a", timeout_s=0, disk="sda", arguments="console=ttyS0")
    found = parts(options)
    assert found[""][2] == "goto first"
    assert found["image-a"][0] == (
        f"kernel http://x/netboot/system/{'1' * 64} initrd=initrd.img quiet panic=30 hvmgr.url=http://x hvmgr.image=a hvmgr.order={'0' * 64}"
        " hvmgr.disk=sda BOOTIF=01-${netX/mac:hexhyp} console=ttyS0 || goto failed"
    )


def test_default_image_comes_after_the_disks():
    found = parts(NetbootOptions("http://x", default="a"))
    assert "choose --default first --timeout 15000 picked || goto local" in found["menu"]
    assert found["first"][0] == "iseq ${platform} efi && goto efi ||"
    assert found["first"][1] == "sanboot --no-describe --drive 0x80 || goto image-a"
    assert found["efi"][0] == f"chain --autofree http://x/netboot/system/{'3' * 64} ||"
    assert found["efi"][1] == "goto image-a"
    assert "first" not in parts(NetbootOptions("http://x"))


@pytest.mark.parametrize("default", [None, "a"])
def test_what_a_disk_holds_is_given_up_by_a_choice_of_its_own(default):
    found = parts(NetbootOptions("http://x", default=default, overwrite=True))
    given_up = {label for label, lines in found.items() if any(" hvmgr.overwrite " in one for one in lines)}
    assert given_up == {"again-a"}
    assert "item again-a a" in found["menu"]
    assert not any("again" in line for label, lines in found.items() if label != "menu" for line in lines)
    with pytest.raises(errors.UsageError, match="choose what a disk loses"):
        netboot.require_options(NetbootOptions("http://x", default="a", overwrite=True, timeout_s=0))


def test_order_is_read_by_the_shell_as_it_was_meant():
    text = netboot.order(How.NATIVE, {"entry": "a'b\n$(reboot)"}).decode()
    assert text == "how=native\nentry='a'\"'\"'b\n$(reboot)'\n"
