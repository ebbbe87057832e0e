"""``hvmgr boot`` without booting: what is refused and how, and that the menu stays as it was whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from hvmgr import vhd
from hvmgr.host import image_locks, volumes
from hvmgr.model import boot_menu
from hvmgr.operations.boot import layers, machine
from hvmgr.storage import durable, layer
from hvmgr.vhd.source import read
from tests.operations.boot import mini, physical

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "commands.md").read_text("utf-8")
VERSION = mini.LOOKALIKE
SIZE = 12 << 20
CHUNK = layer.CHUNK


@pytest.fixture(scope="module")
def raw(tmp_path_factory, require_program):
    """A disk that has all that a Linux needs to be added, and would not boot."""
    for program in ("mke2fs", "dmsetup", "ldd"):
        require_program(program)
    folder = tmp_path_factory.mktemp("raw")
    mini.make_lookalike(folder / "raw", folder / "tree", SIZE)
    return folder / "raw"


@pytest.fixture
def place(tmp_path, raw):
    """A volume with a menu and ``os.vhd``."""
    found = physical.Physical(tmp_path)
    mini.make_vhd(found.tree / "VHD" / "os.vhd", raw, vhd.Kind.DYNAMIC)
    return found


@pytest.fixture
def os_vhd(place):
    return place.tree / "VHD" / "os.vhd"


@pytest.fixture
def added(place, os_vhd, hvmgr):
    """Its entry, with the title Blue."""
    assert hvmgr("boot", "add", os_vhd, "--name", "Blue", *place.options).code == 0
    return place


def menu_of(place):
    return place.tree / "boot" / "grub" / "custom.cfg"


def state(place):
    """Everything on the volume, by content."""
    return {
        str(one.relative_to(place.tree)): hashlib.sha256(one.read_bytes()).hexdigest()
        for one in sorted(place.tree.rglob("*"))
        if one.is_file()
    }


def refused(answer, code, *words):
    """One sentence, and the code that belongs to it."""
    assert answer.code == code, answer
    lines = [line for line in answer.err.splitlines() if line.startswith("hvmgr: ")]
    assert len(lines) == 1
    for word in words:
        assert word in answer.err


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "code", "words"),
        [
            pytest.param(["--no-layer"], 5, ["dynamic", "layer"], id="no-layer-for-a-dynamic-one"),
            pytest.param(["--kernel", "9.9"], 3, ["9.9"], id="no-such-kernel"),
            pytest.param(["--append", "a='b"], 2, ["quotes"], id="open-quote"),
            pytest.param(["--name", "two\nlines"], 2, ["one line"], id="title"),
            pytest.param(["--volume-type", "btrfs"], 5, ["btrfs", "ext4 or NTFS"], id="file-system"),
            pytest.param(["--qualified"], 2, ["--windows"], id="option-for-windows"),
        ],
    )
    def test_wrong_wish_changes_nothing(self, place, os_vhd, hvmgr, options, code, words):
        before = state(place)
        refused(hvmgr("boot", "add", os_vhd, *place.options, *options), code, *words)
        assert state(place) == before

    def test_volume_that_is_no_disk(self, place, hvmgr, raw, tmp_path_factory):
        memory = Path("/dev/shm")
        if not memory.is_mount():
            pytest.skip("/dev/shm is no tmpfs here")
        path = memory / f"hvmgr-test-{os.getpid()}.vhd"
        try:
            mini.make_vhd(path, raw, vhd.Kind.DYNAMIC)
            refused(hvmgr("boot", "add", path, *place.boot_dir), 5, "tmpfs", "ext4 or NTFS")
        finally:
            path.unlink(missing_ok=True)

    def test_disk_that_is_too_large_when_written(self, place, hvmgr):
        path = place.tree / "VHD" / "large.vhd"
        vhd.create(path, 2040 << 30)
        refused(hvmgr("boot", "add", path, *place.options), 7, "free", "fully written")
        assert not menu_of(place).exists()

    def test_what_layers_of_other_entries_may_take_is_not_free(self, added, os_vhd, raw, hvmgr, monkeypatch):
        """Where nothing could reserve it: their layers are holes."""
        other = os_vhd.with_name("other.vhd")
        mini.make_vhd(other, raw, vhd.Kind.DYNAMIC)
        held = Path(f"{os_vhd}.boot/layer")
        os.truncate(held, 0)
        os.truncate(held, layer.size_for(SIZE))
        free = SimpleNamespace(free=(64 << 20) + layer.size_for(SIZE) + (4 << 20))
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _path: free)
            refused(hvmgr("boot", "add", other, *added.options), 7, "other entries", "fully written")
            layer.empty(held, SIZE)
            if layer.unfilled(held, SIZE) == 0:
                assert hvmgr("boot", "add", other, *added.options).code == 0

    def test_vhd_that_somebody_has_open(self, place, os_vhd, hvmgr):
        with image_locks.held(os_vhd):
            refused(hvmgr("boot", "add", os_vhd, *place.options), 4, "in use")

    def test_system_that_was_not_shut_down(self, place, os_vhd, hvmgr):
        with vhd.open_chain(os_vhd, writable=True) as disk:
            flags = bytearray(read(disk, mini.START + 1024 + 96, 4))
            flags[0] |= 4
            disk.write(mini.START + 1024 + 96, flags)
            disk.flush()
        refused(hvmgr("boot", "add", os_vhd, *place.options), 4, "not unmounted cleanly")

    @pytest.mark.parametrize("name", ["os.vhdx", "os.qcow2", "blank.vhd", "none.vhd"])
    def test_image_that_cannot_be_booted(self, place, hvmgr, name):
        path = place.tree / "VHD" / name
        if name != "none.vhd":
            assert hvmgr("image", "create", path, "--size", "4M").code == 0
        code, word = (3, "there is no") if name == "none.vhd" else (5, "natively")
        refused(hvmgr("boot", "add", path, *place.options), code, word)
        assert not menu_of(place).exists()

    def test_machine_without_grub(self, place, os_vhd, hvmgr):
        durable.remove(place.tree / "boot" / "grub" / "grub.cfg")
        refused(hvmgr("boot", "add", os_vhd, *place.options), 5, "no GRUB menu")
        refused(hvmgr("boot", "list", "--boot-dir", place.tree / "nothing"), 3, "no folder")

    def test_menu_that_would_not_show_it(self, place, os_vhd, hvmgr):
        (place.tree / "boot" / "grub" / "grub.cfg").write_text("set timeout=5\n")
        refused(hvmgr("boot", "add", os_vhd, *place.options), 5, "does not read custom.cfg")
        assert not (os_vhd.parent / "os.vhd.boot").exists()

    def test_torn_menu_is_left_alone(self, added, os_vhd, hvmgr):
        text = menu_of(added).read_text().replace("### END hvmgr", "### end hvmgr")
        menu_of(added).write_text(text)
        for command in (["list"], ["remove", "Blue"], ["default", "Blue"], ["add", os_vhd, *added.options[2:]]):
            refused(hvmgr("boot", *command, *added.boot_dir), 6, "do not fit together")
        assert menu_of(added).read_text() == text

    def test_name_that_is_not_there_or_taken(self, added, os_vhd, hvmgr):
        refused(hvmgr("boot", "remove", "Red", *added.boot_dir), 3, "Red", "'Blue'")
        refused(hvmgr("boot", "add", os_vhd, *added.options), 4, "--replace")
        shutil.copy(os_vhd, os_vhd.with_name("other.vhd"))
        refused(hvmgr("boot", "add", os_vhd.with_name("other.vhd"), "--name", "Blue", *added.options), 4, "Blue")
        refused(hvmgr("boot", "default", *added.boot_dir), 2, "--none")

    def test_boot_partition_that_is_full(self, place, os_vhd, raw):
        """The menu is the one before, whatever was written first."""
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small file system")
        script = """
            mount -t tmpfs -o size=16k small "$1/boot/grub" && printf '# custom.cfg\\n' > "$1/boot/grub/grub.cfg"
            printf '# mine\\n' > "$1/boot/grub/custom.cfg"; head -c 60000 /dev/zero > "$1/boot/grub/full"
            shift; "$@"; code=$?; cat "$0/boot/grub/custom.cfg"; ls -A "$0/boot/grub"; exit $code
        """
        command = [sys.executable, "-m", "hvmgr", "boot", "add", os_vhd, *place.options]
        told = subprocess.run(
            ["unshare", "-m", "bash", "-c", script, place.tree, place.tree, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == 7, told
        assert told.stdout.splitlines() == ["# mine", "custom.cfg", "full", "grub.cfg"]


class TestEntry:
    def test_says_what_is_worth_knowing(self, place, os_vhd, hvmgr):
        answer = hvmgr("boot", "add", os_vhd, "--json", *place.options)
        assert "was not generalised" in answer.err
        made = answer.json["entry"]
        assert (made["kernel"], made["arguments"], made["type"]) == (VERSION, "quiet", "dynamic")
        assert made["layer"] == f"{os_vhd}.boot/layer"

    def test_dry_run_writes_nothing(self, place, os_vhd, hvmgr):
        before = state(place)
        plan = hvmgr("boot", "add", os_vhd, "--dry-run", "--json", *place.options).json["plan"]
        assert [one["step"] for one in plan["finish"]] == ["PutBootFiles", "MakeLayer", "WriteMenu"]
        assert state(place) == before

    def test_words_of_others_stay(self, place, os_vhd, hvmgr):
        menu_of(place).write_text("# mine\n")
        assert hvmgr("boot", "add", os_vhd, "--name", "Blue", *place.options).code == 0
        assert hvmgr("boot", "default", "Blue", *place.boot_dir).code == 0
        assert (menu_of(place).parent / "custom.cfg.hvmgr-old").exists()
        assert hvmgr("boot", "remove", "Blue", *place.boot_dir).code == 0
        assert menu_of(place).read_text() == "# mine\n"
        assert not (os_vhd.parent / "os.vhd.boot").exists()
        assert sorted(one.name for one in os_vhd.parent.iterdir()) == ["os.vhd"]

    def test_once_stands_in_the_environment(self, added, hvmgr, monkeypatch):
        monkeypatch.setattr(volumes, "is_stacked", lambda _device: False)  # wherever the tests' folder lies
        assert hvmgr("boot", "default", "Blue", "--once", *added.boot_dir).code == 0
        entry = boot_menu.entries(menu_of(added).read_text())[0]
        block = (menu_of(added).parent / "grubenv").read_bytes()
        assert (len(block), f"next_entry=hvmgr-{entry.id}\n".encode() in block) == (1024, True)
        (menu_of(added).parent / "grub.cfg").write_text("source custom.cfg\n")
        refused(hvmgr("boot", "default", "Blue", "--once", *added.boot_dir), 5, "one start only")

    @pytest.mark.parametrize("device", ["/dev/dm-3", "/dev/md0", "/dev/loop7"])
    def test_once_where_grub_cannot_take_it_back(self, added, hvmgr, monkeypatch, device):
        """The entry would be started for ever."""
        monkeypatch.setattr(volumes, "of", lambda path: volumes.Volume(path, device, "ext4", None))
        before = state(added)
        refused(hvmgr("boot", "default", "Blue", "--once", *added.boot_dir), 5, device, "again and again")
        assert state(added) == before

    def test_links_lead_to_the_files_that_are_written(self, added, hvmgr, monkeypatch):
        monkeypatch.setattr(volumes, "is_stacked", lambda _device: False)
        folder = menu_of(added).parent
        other = added.tree / "boot" / "efi"
        other.mkdir()
        for name, mode, data in (("grubenv", 0o700, None), ("custom.cfg", 0o640, menu_of(added).read_bytes())):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(f"../efi/{name}")
            (other / name).write_bytes(boot_menu.environment(None, "a", "b") if data is None else data)
            (other / name).chmod(mode)
        assert hvmgr("boot", "default", "Blue", "--once", *added.boot_dir).code == 0
        assert hvmgr("boot", "default", "Blue", *added.boot_dir).code == 0
        assert b"next_entry=hvmgr-" in (other / "grubenv").read_bytes()
        assert boot_menu.chosen((other / "custom.cfg").read_text()) is not None
        for name, mode in (("grubenv", 0o700), ("custom.cfg", 0o640)):
            assert ((folder / name).is_symlink(), (other / name).stat().st_mode & 0o777) == (True, mode)

    def test_table_is_for_all_files_of_a_chain(self, place, os_vhd, hvmgr):
        child = os_vhd.with_name("child.vhd")
        vhd.create(child, parent=os_vhd)
        made = hvmgr("boot", "add", child, "--json", *place.options).json["entry"]
        assert [one["path"] for one in made["files"]] == ["/VHD/child.vhd", "/VHD/os.vhd"]
        assert made["copied"]
        assert (child.parent / "child.vhd.boot" / "kernel").read_bytes() == b"kernel"

    def test_script_for_windows(self, place, os_vhd, hvmgr, tmp_path):
        answer = hvmgr("boot", "add", os_vhd, "--windows", "--volume", place.tree, "--output", tmp_path / "add.cmd")
        assert answer.code == 0
        assert rb'"vhd=[locate]\VHD\os.vhd"' in (tmp_path / "add.cmd").read_bytes()
        again = ["boot", "add", os_vhd, "--windows", "--volume", place.tree, "--output", tmp_path / "add.cmd"]
        refused(hvmgr(*again), 4, "exists")
        told = hvmgr("boot", "add", os_vhd, "--windows", "--qualified", "--drive", "d:", "--volume", place.tree)
        assert r'device "vhd=[D:]\VHD\os.vhd"' in told.out
        assert not menu_of(place).exists()


class TestLayer:
    NEW: ClassVar = {512: b"n" * CHUNK, 2600: b"m" * CHUNK}  # chunks of the disk

    @pytest.fixture
    def written(self, added, os_vhd):
        """A layer that holds two chunks."""
        physical.write_layer(Path(f"{os_vhd}.boot/layer"), self.NEW)
        return added

    @pytest.fixture
    def whole(self, os_vhd):
        """What the disk is with the layer."""
        with vhd.open_chain(os_vhd) as disk:
            data = bytearray(read(disk, 0, disk.size))
        for chunk, content in self.NEW.items():
            data[chunk * CHUNK : (chunk + 1) * CHUNK] = content
        return bytes(data)

    def content(self, path):
        with vhd.open_chain(path) as disk:
            return read(disk, 0, disk.size)

    def test_merge_puts_it_into_the_vhd(self, written, os_vhd, whole, hvmgr):
        answer = hvmgr("boot", "merge", "Blue", "--json", *written.boot_dir)
        assert (answer.code, answer.json["bytes"]) == (0, 2 * CHUNK)
        assert self.content(os_vhd) == whole
        shown = hvmgr("boot", "list", "--json", *written.boot_dir).json["entries"][0]
        assert (shown["written"], shown["problem"], shown["name"]) == (0, None, "Blue")
        assert sorted(one.name for one in os_vhd.parent.iterdir()) == ["os.vhd", "os.vhd.boot"]

    @pytest.mark.parametrize(
        "where", ["_write_child", "rename", "images.merge", "write_file", "layer.empty", "_make", "settle"]
    )
    def test_merge_that_is_cut_off_is_completed(self, written, os_vhd, whole, hvmgr, monkeypatch, where):
        """It dies before that act; the disk then is that before or, once begun, waits for the next merge."""
        before = self.content(os_vhd)

        def die(*_args, **_named):
            raise KeyboardInterrupt

        from hvmgr.operations.boot import entries
        from hvmgr.operations.images import merging

        owner, name = {
            "_write_child": (layers, "_write_child"),
            "rename": (durable, "rename"),
            "images.merge": (merging, "merge"),
            "write_file": (durable, "write_file"),
            "layer.empty": (layer, "empty"),
            "_make": (entries.BootMenu, "_make"),
            "settle": (layers, "settle"),
        }[where]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die)
            assert hvmgr("boot", "merge", "Blue", *written.boot_dir).code == 130
        assert self.content(os_vhd) in (before, whole)
        if where not in {"_write_child", "rename"}:
            shown = hvmgr("boot", "list", "--json", *written.boot_dir).json["entries"][0]
            assert "cut off" in shown["problem"]
            refused(hvmgr("boot", "revert", "Blue", "--yes", *written.boot_dir), 4, "boot merge")
            refused(hvmgr("boot", "add", os_vhd, "--replace", *written.options), 4, "cut off", "boot merge")
        assert hvmgr("boot", "merge", "Blue", *written.boot_dir).code == 0
        assert self.content(os_vhd) == whole
        assert sorted(one.name for one in os_vhd.parent.iterdir()) == ["os.vhd", "os.vhd.boot"]
        assert sorted(one.name for one in Path(f"{os_vhd}.boot").iterdir()) == ["layer", "supplement"]

    def cut_off(self, place, hvmgr, monkeypatch):
        """A merge dies when the layer is put aside, and nothing of it in the VHD."""
        from hvmgr.operations.images import merging

        def die(*_args, **_named):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(merging, "merge", die)
            assert hvmgr("boot", "merge", "Blue", *place.boot_dir).code == 130

    def test_merge_whose_child_is_lost_writes_it_again(self, written, os_vhd, whole, hvmgr, monkeypatch):
        self.cut_off(written, hvmgr, monkeypatch)
        durable.remove(os_vhd.with_name("os.vhd.merging"))
        answer = hvmgr("boot", "merge", "Blue", "--json", *written.boot_dir)
        assert (answer.code, answer.json["bytes"]) == (0, 2 * CHUNK)
        assert self.content(os_vhd) == whole

    def test_merge_throws_no_second_layer_away(self, written, os_vhd, hvmgr, monkeypatch):
        self.cut_off(written, hvmgr, monkeypatch)
        second = Path(f"{os_vhd}.boot/layer")
        layer.make(second, SIZE)
        physical.write_layer(second, {700: b"s" * CHUNK})
        before = state(written)
        refused(hvmgr("boot", "merge", "Blue", *written.boot_dir), 4, "cut off", str(second), "layer.merging")
        assert state(written) == before

    def test_what_was_written_after_a_merge_that_lacks_its_last_step_is_merged(
        self, written, os_vhd, whole, hvmgr, monkeypatch
    ):
        def die(*_args, **_named):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(layers, "settle", die)
            assert hvmgr("boot", "merge", "Blue", *written.boot_dir).code == 130
        physical.write_layer(Path(f"{os_vhd}.boot/layer"), {700: b"s" * CHUNK})
        assert hvmgr("boot", "merge", "Blue", *written.boot_dir).code == 0
        assert self.content(os_vhd) == whole[: 700 * CHUNK] + b"s" * CHUNK + whole[701 * CHUNK :]

    def test_entry_on_which_another_command_works(self, written, os_vhd, hvmgr):
        before = state(written)
        with layers.alone(SimpleNamespace(wait_s=0.0), os_vhd):
            for command in (["merge", "Blue"], ["revert", "Blue"], ["remove", "Blue", "--yes"]):
                refused(
                    hvmgr("--wait", "0", "boot", *command, *written.boot_dir), 4, "another command works", str(os_vhd)
                )
            refused(
                hvmgr("--wait", "0", "boot", "add", os_vhd, "--replace", *written.options), 4, "another command works"
            )
        assert state(written) == before

    def test_kept_as_a_vhd_of_its_own(self, written, os_vhd, whole, hvmgr):
        before = self.content(os_vhd)
        assert hvmgr("boot", "merge", "Blue", "--to", os_vhd.with_name("new.vhd"), *written.boot_dir).code == 0
        assert self.content(os_vhd.with_name("new.vhd")) == whole
        assert self.content(os_vhd) == before
        refused(hvmgr("boot", "merge", "Blue", *written.boot_dir), 4, "new.vhd")
        again = hvmgr("boot", "merge", "Blue", "--to", os_vhd.with_name("new.vhd"), *written.boot_dir)
        refused(again, 4, "new.vhd")

    def test_revert_throws_it_away(self, written, os_vhd, hvmgr):
        before = self.content(os_vhd)
        assert hvmgr("boot", "revert", "Blue", *written.boot_dir).code == 0
        assert self.content(os_vhd) == before
        assert hvmgr("boot", "list", "--json", *written.boot_dir).json["entries"][0]["written"] == 0

    def test_does_not_fit_a_vhd_that_was_changed(self, written, os_vhd, hvmgr):
        physical.later(os_vhd, 5)
        held = hashlib.sha256(Path(f"{os_vhd}.boot/layer").read_bytes()).hexdigest()
        assert "was changed" in hvmgr("boot", "list", "--json", *written.boot_dir).json["entries"][0]["problem"]
        refused(hvmgr("boot", "merge", "Blue", *written.boot_dir), 4, "was changed")
        refused(hvmgr("boot", "test", "Blue", *written.boot_dir), 4, "was changed")
        refused(hvmgr("boot", "add", os_vhd, "--replace", *written.options), 4, "was changed", "boot revert")
        assert hashlib.sha256(Path(f"{os_vhd}.boot/layer").read_bytes()).hexdigest() == held
        assert hvmgr("boot", "revert", "Blue", *written.boot_dir).code == 0
        assert hvmgr("boot", "add", os_vhd, "--replace", *written.options).code == 0
        assert hvmgr("boot", "list", "--json", *written.boot_dir).json["entries"][0]["problem"] is None

    def test_is_kept_when_the_entry_is_made_anew(self, written, os_vhd, hvmgr):
        assert hvmgr("boot", "add", os_vhd, "--replace", "--append", "nosplash", *written.options).code == 0
        shown = hvmgr("boot", "list", "--json", *written.boot_dir).json["entries"][0]
        assert (shown["written"], shown["name"], shown["arguments"]) == (2 * CHUNK, "Blue", "quiet nosplash")

    def test_commands_that_change_images_leave_its_vhd_alone(self, written, os_vhd, hvmgr):
        before = state(written)
        for command, *options in (["compact"], ["resize", "14M"], ["generalize"], ["prepare", "--force"]):
            answer = hvmgr("image", command, os_vhd, *options, "--yes")
            refused(answer, 4, f"{os_vhd}.boot/layer", "boot merge", "boot revert")
        assert state(written) == before

    def test_parents_and_children_of_its_vhd_are_left_alone_too(self, place, os_vhd, hvmgr):
        child = os_vhd.with_name("child.vhd")
        vhd.create(child, parent=os_vhd)
        assert hvmgr("boot", "add", child, "--name", "Child", *place.options).code == 0
        assert hvmgr("image", "compact", os_vhd).code == 0
        assert hvmgr("boot", "add", child, "--replace", *place.options).code == 0
        physical.write_layer(Path(f"{child}.boot/layer"), self.NEW)
        for command in (["compact", os_vhd], ["merge", child]):
            refused(hvmgr("image", *command, "--yes"), 4, "child.vhd.boot/layer")
        users = hvmgr("image", "info", os_vhd, "--json").json
        assert "native" in json.dumps(users)
        assert hvmgr("boot", "merge", "Child", *place.boot_dir).code == 0
        assert hvmgr("image", "compact", os_vhd).code == 0

    @pytest.mark.parametrize(
        ("at", "data"), [(4, b"\0"), (0, b"what"), (CHUNK + 8, b"\xff" * 7)], ids=["full", "no-store", "leads-nowhere"]
    )
    def test_damaged_one_is_thrown_away(self, written, os_vhd, hvmgr, at, data):
        before = self.content(os_vhd)
        held = Path(f"{os_vhd}.boot/layer")
        with held.open("r+b") as file:
            file.seek(at)
            file.write(data)
        told = hvmgr("boot", "add", os_vhd, "--replace", *written.options)
        assert told.code == 0
        assert "cannot be used" in told.err
        assert layer.is_used(held)
        answer = hvmgr("boot", "revert", "Blue", "--json", *written.boot_dir)
        assert (answer.code, answer.json["bytes"] >= 2 * CHUNK) == (0, True)
        shown = hvmgr("boot", "list", "--json", *written.boot_dir).json["entries"][0]
        assert (shown["written"], shown["problem"]) == (0, None)
        assert self.content(os_vhd) == before

    def test_full_one_is_refused(self, written, os_vhd, hvmgr):
        with Path(f"{os_vhd}.boot/layer").open("r+b") as file:
            file.seek(4)
            file.write(b"\0")
        refused(hvmgr("boot", "merge", "Blue", *written.boot_dir), 6, "ran out of space", "boot revert")
        refused(hvmgr("boot", "remove", "Blue", *written.boot_dir), 2, "--yes")

    def test_remove_asks_for_it(self, written, hvmgr):
        before = state(written)
        refused(hvmgr("boot", "remove", "Blue", *written.boot_dir), 2, "--yes")
        assert state(written) == before
        assert hvmgr("boot", "remove", "Blue", "--yes", *written.boot_dir).code == 0

    def test_fixed_vhd_has_none(self, place, raw, hvmgr):
        path = place.tree / "VHD" / "fixed.vhd"
        mini.make_vhd(path, raw, vhd.Kind.FIXED)
        assert hvmgr("boot", "add", path, "--name", "Fixed", *place.options).code == 0
        refused(hvmgr("boot", "merge", "Fixed", *place.boot_dir), 4, "no layer")
        refused(hvmgr("boot", "revert", "Fixed", *place.boot_dir), 4, "no layer")


def test_menu_of_a_played_machine_is_one_that_grub_reads(tmp_path, require_program):
    (tmp_path / "grub.cfg").write_text(machine.MENU)
    subprocess.run([require_program("grub-script-check"), tmp_path / "grub.cfg"], check=True)


SHAPES = {
    name: json.loads(text)
    for name, text in re.findall(r"<!-- boot shape: ([\w ]+) -->\n```json\n(.*?)```", PAGE, re.DOTALL)
}
SHAPED = {
    "boot list": ["list"],
    "boot default": ["default", "--none"],
    "boot merge": ["merge", "Blue"],
    "boot revert": ["revert", "Blue"],
    "boot add": ["add", "VHD", "--replace"],
}


def test_documents_have_exactly_the_documented_keys(added, os_vhd, hvmgr):
    assert {*SHAPED, "boot test"} == SHAPES.keys()
    for name, words in SHAPED.items():
        options = added.options if words[0] == "add" else added.boot_dir
        answer = hvmgr("boot", *(os_vhd if word == "VHD" else word for word in words), "--json", *options)
        assert keys(answer.json) == keys(SHAPES[name]), name


def keys(value):
    """The shape of a document: names of keys, for lists that of their first item."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None
