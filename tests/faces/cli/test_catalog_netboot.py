"""``hvmgr catalog netboot``: what machines are handed, what the shell makes of it, and a machine that starts over the network."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import lzma
import os
import random
import re
import shlex
import subprocess
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from hvmgr import settings, vhd
from hvmgr.host import bare_machine, grub
from hvmgr.model import boot_menu
from hvmgr.operations.boot import machine, netboot_system
from hvmgr.storage import ext, initramfs, kernels, layer, partitions
from tests.operations.boot import mini

MIB = 1 << 20
PAGE = (Path(__file__).resolve().parents[3] / "docs" / "commands.md").read_text("utf-8")
URL = "http://deploy.example:8080/catalog"
SIZE = 12 * MIB


# A boot sector's code that says something on the serial port, a byte at a time, and turns the machine off as a reset does:
# xor ax,ax; mov ds,ax; mov si,7c1ah; next: lodsb; test al,al; jz end; mov dx,3f8h; out dx,al; jmp next;
# end: mov dx,0cf9h; mov al,6; out dx,al; jmp $
SPEAKING = bytes.fromhex("31c08ed8be1a7cac84c07406baf803eeebf5baf90cb006eeebfe") + b"the disk has started\n\0"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; what ``cut`` names ends in the middle. ``asked`` are the paths that were asked for."""

    cut = ""
    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        self.asked.append(self.path)

    def copyfile(self, source, outputfile):
        if self.cut and self.path.endswith(self.cut):
            outputfile.write(source.read(100_000))
            return
        with contextlib.suppress(ConnectionError):  # a machine asks whether the image is there, and breaks off
            super().copyfile(source, outputfile)


@pytest.fixture
def serve():
    """``serve(folder, cut, asked)``: a web server on the loopback that shows a folder; its port."""
    servers = []

    def start(folder, cut="", asked=None):
        asked = [] if asked is None else asked
        handler = functools.partial(type("Cut", (Handler,), {"cut": cut, "asked": asked}), directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A kernel and modules that nothing would start: what the commands want to see."""
    folder = tmp_path_factory.mktemp("kernel")
    modules = folder / "modules" / "6.1.0"
    (modules / "kernel" / "drivers" / "nvme" / "host").mkdir(parents=True)
    module = b"..\0alias=pci:v1*\0depends=base\0firmware=card.bin\0firmware=none.bin\0"
    (modules / "kernel" / "drivers" / "nvme" / "host" / "nvme-x.ko").write_bytes(module)
    (modules / "kernel" / "base.ko").write_bytes(b"base")
    (modules / "kernel" / "sound.ko").write_bytes(b"sound")
    text = "kernel/drivers/nvme/host/nvme-x.ko: kernel/base.ko\nkernel/base.ko:\nkernel/sound.ko:\n"
    (modules / "modules.dep").write_text(text)
    (folder / "vmlinuz").write_bytes(b"kernel")
    return ("--kernel", folder / "vmlinuz", "--modules", modules)


@pytest.fixture(scope="module")
def system(tmp_path_factory, require_program):
    """A dynamic VHD with a system that could be booted natively, if it had a kernel."""
    for program in ("mke2fs", "dmsetup", "ldd", "sfdisk", "mcopy", "mkfs.fat", "grub-mkimage"):
        require_program(program)
    folder = tmp_path_factory.mktemp("system")
    mini.make_lookalike(folder / "raw", folder / "tree", SIZE)
    mini.make_vhd(folder / "os.vhd", folder / "raw", vhd.Kind.DYNAMIC)
    return folder / "os.vhd"


@pytest.fixture
def catalog(tmp_path):
    return tmp_path / "catalog"


@pytest.fixture
def quickly(monkeypatch):
    """The environment, which takes a second to pack, is not what the test is about."""
    monkeypatch.setattr(netboot_system, "initrd", lambda *_: b"initrd")
    monkeypatch.setattr(netboot_system, "starter", lambda: b"starter")


def order_of(catalog, name):
    """The file of the order that the script names for an image."""
    script = (catalog / "netboot" / "boot.ipxe").read_text()
    (digest,) = re.findall(rf" hvmgr\.image={name} hvmgr\.order=([0-9a-f]{{64}}) ", script)
    return catalog / "netboot" / "images" / name / digest


def read_order(file):
    """What the shell makes of an order."""
    names = ("how", "vhd", "id", "files", "mtime", "layer", "words", "entry", "volume_id", "size", "file", "map")
    script = f". {shlex.quote(str(file))}; " + "; ".join(f'printf "%s\\0" "${name}"' for name in names)
    told = subprocess.run([initramfs.BUSYBOX, "sh", "-c", script], check=True, capture_output=True, timeout=20)
    return dict(zip(names, told.stdout.decode().split("\0"), strict=False))


def test_script_and_orders_hold_each_other(hvmgr, quickly, catalog, system, kernel, tmp_path):
    words = ("--catalog", catalog)
    assert hvmgr("catalog", "add", system, "--name", "os", "--group", "Linux", *words).code == 0
    (tmp_path / "disk.raw").write_bytes(bytes(MIB) + b"data".ljust(512))
    assert hvmgr("catalog", "add", tmp_path / "disk.raw", *words).code == 0
    assert hvmgr("image", "create", tmp_path / "other.qcow2", "--size", "4M").code == 0
    assert hvmgr("catalog", "add", tmp_path / "other.qcow2", *words).code == 0
    dry = hvmgr("catalog", "netboot", "--url", URL, "--dry-run", *kernel, *words)
    assert (dry.code, "hand out 'os' (as a VHD with a boot entry)" in dry.out) == (0, True)
    assert not (catalog / "netboot").exists()
    told = hvmgr("catalog", "netboot", "--url", URL, "--json", *kernel, *words)
    assert told.code == 0, told
    (shape,) = re.findall(r"<!-- netboot shape -->\n```json\n(.*?)```", PAGE, re.DOTALL)
    documented = json.loads(shape)
    assert documented.keys() == told.json.keys()
    assert all(documented[key][0].keys() == told.json[key][0].keys() for key in ("images", "left_out"))
    assert told.json["images"] == [{"name": "disk", "how": "expand"}, {"name": "os", "how": "native"}]
    assert [one["name"] for one in told.json["left_out"]] == ["other"]
    assert told.json["url"] == f"{URL}/netboot/boot.ipxe"
    folder = catalog / "netboot"
    script = (folder / "boot.ipxe").read_text().splitlines()
    assert "choose --default local --timeout 15000 picked || goto local" in script
    for name in ("os", "disk"):
        file = order_of(catalog, name)
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
        (line,) = [one for one in script if f"hvmgr.image={name} " in one]
        loaded = hashlib.sha256(b"kernel").hexdigest()
        assert line.startswith(f"kernel {URL}/netboot/system/{loaded} initrd=initrd.img ")
        order = read_order(file)
        for served in [
            one.split(" ") for one in (order["files"], order["file"], order["map"]) if one for one in one.split("\n")
        ]:
            data = (catalog / served[2]).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (served[0], int(served[1]))
    order = read_order(order_of(catalog, "os"))
    (entry,) = boot_menu.entries(order["entry"])
    assert (entry.image, entry.title, entry.volume) == ("/VHD/os.vhd", "os", order["volume_id"])
    assert order["layer"] == str(layer.size_for(SIZE))
    assert f"host=UUID={order['volume_id']}\n" in order["words"]
    # Everybody may read what a web server shows; of an image that went nothing is left.
    assert {one.stat().st_mode & 0o444 for one in folder.rglob("*")} == {0o444}
    assert hvmgr("catalog", "remove", "disk", "--yes", *words).code == 0
    assert hvmgr("catalog", "netboot", "os", "--url", URL, "--expand", "--default", "os", *kernel, *words).code == 0
    assert read_order(order_of(catalog, "os"))["how"] == "expand"
    assert {one.name: len(list(one.iterdir())) for one in folder.glob("*/")} == {"images": 1, "system": 3}
    assert len(list((folder / "images" / "os").iterdir())) == 2


def test_environment_has_drivers_and_loaders_but_not_all_modules(kernel, require_program, tmp_path, monkeypatch):
    for program in ("sfdisk", "mke2fs", "mcopy", "mkfs.fat", "grub-mkimage", "cpio"):
        require_program(program)
    made, notices = tmp_path / "initrd.img", []
    (tmp_path / "firmware").mkdir()
    (tmp_path / "firmware" / "card.bin.xz").write_bytes(lzma.compress(b"firmware"))
    monkeypatch.setattr(netboot_system, "_FIRMWARE", tmp_path / "firmware")
    made.write_bytes(netboot_system.initrd(kernels.Kernel(kernel[1], kernel[3]), notices.append))
    words = ["sh", "-c", 'gzip -dc "$1" | cpio -idm --quiet -D "$2"', "sh", made, tmp_path]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    modules = tmp_path / "lib" / "modules" / "6.1.0"
    assert {one.name for one in modules.iterdir()} == {"base.ko", "nvme_x.ko", "modules.alias", "modules.dep"}
    assert (modules / "modules.dep").read_text() == "base.ko:\nnvme_x.ko: base.ko\n"
    assert (modules / "modules.alias").read_text() == "alias pci:v1* nvme_x\n"
    assert (tmp_path / "lib" / "firmware" / "card.bin").read_bytes() == b"firmware"
    (notice,) = notices
    assert notice.startswith(f"1 firmware files that drivers may ask for are not in {tmp_path / 'firmware'} (none.bin)")
    sources = {one.name: one.read_bytes() for one in settings.netboot_folder().iterdir()}
    places = {"init": "init", "mke2fs.conf": "etc/mke2fs.conf"}
    assert {name: (tmp_path / places.get(name, f"hvmgr/{name}")).read_bytes() for name in sources} == sources
    with gzip.open(tmp_path / "hvmgr" / "esp.gz") as file:
        (tmp_path / "esp").write_bytes(file.read())
    listed = subprocess.run(
        ["mdir", "-b", "-i", tmp_path / "esp", "::/EFI/BOOT"], check=True, capture_output=True, text=True
    )
    assert "BOOTX64.EFI" in listed.stdout


def test_script_of_the_program_that_starts_a_disk_is_grubs(require_program, monkeypatch, tmp_path):
    require_program("grub-script-check")
    monkeypatch.setattr(grub, "uefi_loader", lambda script, *_: script.encode())
    script = netboot_system.starter().decode()
    (looped,) = re.findall("^eval '(.*)'$", script, re.MULTILINE)
    (tmp_path / "script").write_text(f"{looped}\n")
    subprocess.run(["grub-script-check", tmp_path / "script"], check=True, capture_output=True, timeout=20)
    assert looped.split("; ")[0].endswith("(hd*,*)/EFI/BOOT/BOOTX64.EFI")
    assert script.endswith("\nexit\n")


def test_names_of_others_stay_names(hvmgr, quickly, catalog, system, kernel):
    """Whoever writes the catalog's document writes no line of a script."""
    words = ("--catalog", catalog)
    description = "${net0/mac} || shell `reboot`\u2028&& ä \\ ; shell"
    assert hvmgr("catalog", "add", system, "--name", "os", "--description", description, *words).code == 0
    document = json.loads((catalog / "catalog.json").read_text())
    odd = "images/o s'; reboot; ${x} \"`.vhd"
    (catalog / "images" / "os.vhd").rename(catalog / odd)
    document["images"][0] |= {"file": odd, "group": "-x\n:local\nshell ; reboot"}
    (catalog / "catalog.json").write_text(json.dumps(document))
    told = hvmgr("catalog", "netboot", "--url", URL, *kernel, *words)
    assert told.code == 0, told
    script = (catalog / "netboot" / "boot.ipxe").read_text()
    assert "item --gap -- -x?:local?shell ? reboot\n" in script
    assert "item image-os os, as a VHD on the disk. ??net0/mac? ?? shell ?reboot???? ? ? ? shell\n" in script
    assert script.count("\n:local\n") == 1
    first = read_order(order_of(catalog, "os"))["files"].split("\n")[0].split(" ")
    assert first[2:] == ["images/o%20s%27%3B%20reboot%3B%20%24%7Bx%7D%20%22%60.vhd", "os.vhd"]
    document["images"][0]["sha256"] = "$(reboot)"
    (catalog / "catalog.json").write_text(json.dumps(document))
    told = hvmgr("catalog", "netboot", "--url", URL, *kernel, *words)
    assert (told.code, "not what was put into the catalog" in told.err) == (6, True)


def test_refusals_change_nothing(hvmgr, quickly, catalog, system, kernel, tmp_path):
    words = ("--catalog", catalog)
    told = hvmgr("catalog", "netboot", "--url", URL, *kernel, *words)
    assert (told.code, "has no image for machines" in told.err) == (3, True)
    assert hvmgr("image", "create", tmp_path / "blank.vhd", "--size", "4M").code == 0
    assert hvmgr("catalog", "add", tmp_path / "blank.vhd", *words).code == 0
    assert hvmgr("catalog", "add", system, "--name", "os", *words).code == 0
    for more, code, what in (
        (("blank",), 5, "no Linux"),
        (("none",), 3, "no image 'none'"),
        (("os", "--timeout", "0"), 2, "somebody has to choose"),
        (("os", "--timeout", "0", "--default", "os", "--overwrite"), 2, "choose what a disk loses"),
        (("os", "--default", "blank"), 2, "not among the images"),
        (("os", "--disk", "sd a"), 2, "no name of a disk"),
        (("os", "--append", "a=${x}"), 2, "characters"),
        (("os", "--append", "a ; shell"), 2, "characters"),
        (("os", "--url", "https://deploy/catalog"), 2, "no address"),
        (("os", "--url", "http://deploy/a b"), 2, "no address"),
        (("os", "--modules", kernel[1]), 3, "no modules.dep"),
        (("os", "--kernel", tmp_path / "none"), 3, "there is no kernel"),
    ):
        told = hvmgr("catalog", "netboot", "--url", URL, *kernel, *more, *words)
        assert (told.code, what in told.err) == (code, True), told
    told = hvmgr("catalog", "netboot", "--url", URL, *kernel[:2], *words)
    assert (told.code, "belong together" in told.err) == (2, True)
    assert not (catalog / "netboot" / "boot.ipxe").exists()


class Environment:
    """The boot environment's scripts in a folder of this host: the disk is a file, a failure ends them."""

    def __init__(self, folder, catalog, port):
        self.folder, self.catalog = folder, catalog
        self.disk = folder / "disk"
        self.url = f"http://127.0.0.1:{port}"
        (folder / "run").mkdir(exist_ok=True)

    def run(self, name, *, digest=None, overwrite=True, more=""):
        digest = digest or order_of(self.catalog, name).name
        wishes = f"quiet hvmgr.url={self.url} hvmgr.image={name} hvmgr.order={digest}"
        scripts = settings.netboot_folder()
        text = f"""
            set -f -o pipefail
            run={shlex.quote(str(self.folder / "run"))}
            . {scripts}/functions
            say() {{ echo "hvmgr: $1"; }}
            fail() {{ say "$1"; kill $$; exit 1; }}
            disk={shlex.quote(str(self.disk))} disk_size=$(stat -c %s {shlex.quote(str(self.disk))})
            read_wishes {shlex.quote(wishes + (" hvmgr.overwrite" if overwrite else ""))}
            read_order
            . "{scripts}/$how"
            tool() {{ # blkdiscard of a file, which asks on a terminal as that does
                ! [ -t 0 ] || return
                dd if=/dev/zero of="$7" bs=512 seek=$(($4 / 512)) count=$(($6 / 512)) conv=notrunc 2> /dev/null
            }}
            {more}
            place_image
            say "$image is on $disk"
        """
        # As on the machine: the programs are all busybox's.
        bin_folder = self.folder / "bin"
        if not bin_folder.exists():
            bin_folder.mkdir()
            subprocess.run([initramfs.BUSYBOX, "--install", "-s", bin_folder], check=True, timeout=20)
        terminal, console = os.openpty()
        told = subprocess.run(
            [initramfs.BUSYBOX, "sh", "-c", text], stdin=console, check=False, capture_output=True, text=True, timeout=60,
            env={"PATH": str(bin_folder)},
        )  # fmt: skip
        os.close(terminal)
        os.close(console)
        assert all(one.startswith(("wget: ", "Terminated")) for one in told.stderr.splitlines()), told.stderr
        return told.stdout.splitlines()[-1]


@pytest.fixture
def expanding(hvmgr, quickly, catalog, kernel, tmp_path, serve, require_program):
    """``expanding(kind, cut)``: an image with holes, handed out to be written to a whole disk, which holds old data."""
    for program in ("sfdisk", "mcopy", "mkfs.fat", "grub-mkimage"):
        require_program(program)

    def make(kind, cut=""):
        chosen = random.Random(7)
        data = bytearray(9 * MIB)
        for at in (0, 700_000 // 512 * 512, MIB - 512, 2 * MIB - 1024, 5 * MIB + 512):
            data[at : at + 300_032] = chosen.randbytes(300_032)
        (tmp_path / "a.raw").write_bytes(data)
        if kind != "raw":
            with vhd.RawSource(tmp_path / "a.raw") as source:
                vhd.write_image(tmp_path / "a.vhd", source, kind=vhd.Kind(kind))
        name = "a.raw" if kind == "raw" else "a.vhd"
        assert hvmgr("catalog", "add", tmp_path / name, "--catalog", catalog).code == 0
        told = hvmgr("catalog", "netboot", "--url", URL, "--expand", *kernel, "--catalog", catalog)
        assert told.code == 0, told
        found = Environment(tmp_path, catalog, serve(catalog, cut))
        found.disk.write_bytes(b"old!" * (3 * MIB))
        return found, bytes(data)

    return make


@pytest.mark.parametrize("kind", ["raw", "fixed", "dynamic"])
def test_whole_disk_is_what_the_image_shows(expanding, kind):
    environment, data = expanding(kind)
    assert environment.run("a") == f"hvmgr: a is on {environment.disk}"
    written = environment.disk.read_bytes()
    assert written[: len(data)] == data
    assert written[len(data) : -MIB] == b"old!" * ((len(written) - MIB - len(data)) // 4)
    assert written[-MIB:] == bytes(MIB)  # an old table's second copy


@pytest.mark.parametrize("kind", ["raw", "dynamic"])
def test_damaged_download_leaves_a_disk_that_starts_nothing(expanding, kind):
    environment, _ = expanding(kind)
    file = environment.catalog / "images" / f"a.{'raw' if kind == 'raw' else 'vhd'}"
    file.chmod(0o600)
    with file.open("r+b") as image:
        image.seek(5 * MIB + 5000 if kind == "raw" else 1_000_000)
        image.write(b"x")
    said = environment.run("a")
    assert "is not what the catalog says (its checksum)" in said
    assert said.endswith("starts nothing")
    assert environment.disk.read_bytes()[:MIB] == bytes(MIB)


def test_download_that_is_cut_off_leaves_a_disk_that_starts_nothing(expanding):
    environment, _ = expanding("dynamic", cut=".vhd")
    said = environment.run("a")
    assert "did not come whole" in said
    assert environment.disk.read_bytes()[:MIB] == bytes(MIB)


def test_disk_that_holds_something_is_left_alone(expanding):
    environment, _ = expanding("dynamic")
    before = environment.disk.read_bytes()
    assert "holds something already" in environment.run("a", overwrite=False)
    order_of(environment.catalog, "a").with_name("0" * 64).write_text("reboot")
    assert "is not what the catalog says" in environment.run("a", digest="0" * 64)
    assert "cannot be loaded" in environment.run("a", digest="1" * 64)
    environment.disk.write_bytes(before[: 8 * MIB])
    assert "needs 9: nothing was written" in environment.run("a")
    assert environment.disk.read_bytes() == before[: 8 * MIB]


def test_disk_that_cannot_be_read_is_not_taken_for_blank(expanding):
    environment, _ = expanding("dynamic")
    environment.disk.write_bytes(bytes(12 * MIB))
    failing = 'dd() { case "$*" in "if=$disk "*) return 1 ;; *) command dd "$@" ;; esac; }'
    assert "cannot be read" in environment.run("a", overwrite=False, more=failing)
    assert environment.disk.read_bytes() == bytes(12 * MIB)


def test_head_is_written_only_when_the_rest_is_on_the_disk(expanding):
    """A disk that fails says so when what was written to it is asked for, and not before."""
    environment, _ = expanding("dynamic")
    failing = 'dd() { case "$*" in "if=/dev/null of=$disk "*fsync*) return 1 ;; *) command dd "$@" ;; esac; }'
    assert environment.run("a", more=failing).endswith("cannot be written: it starts nothing")
    assert environment.disk.read_bytes()[:MIB] == bytes(MIB)


def test_nothing_is_given_up_for_an_image_that_does_not_come(expanding):
    environment, _ = expanding("dynamic")
    before = environment.disk.read_bytes()
    (environment.catalog / "images" / "a.vhd").unlink()
    assert environment.run("a").endswith("a.vhd cannot be loaded: nothing was written")
    assert environment.disk.read_bytes() == before


def test_disk_is_not_divided_for_what_does_not_fit_or_come(hvmgr, quickly, catalog, system, kernel, tmp_path, serve):
    words = ("--catalog", catalog)
    (tmp_path / "user-data").write_text("#cloud-config\n")
    answer = ("--answer", tmp_path / "user-data")
    assert hvmgr("catalog", "add", system, "--name", "os", *answer, *words).code == 0
    told = hvmgr("catalog", "netboot", "--url", URL, *kernel, *words)
    assert (told.code, "the answer file of 'os' is not handed out" in told.err) == (0, True), told
    order = order_of(catalog, "os")
    hvmgr("catalog", "netboot", "--url", URL, *kernel, *words)
    assert order_of(catalog, "os") == order  # nothing has changed
    environment = Environment(tmp_path, catalog, serve(catalog))
    own = 'is_ours() { false; }; make_volume() { fail "divided"; }'
    for size, said in ((100 * MIB, "has room for 56: nothing was written"), (400 * MIB, "divided")):
        with environment.disk.open("wb") as file:
            file.write(b"old!")
            file.truncate(size)
        assert environment.run("os", more=own).endswith(said)
    (path,) = re.findall(r" (\S+) os\.vhd\.boot/supplement", read_order(order)["files"])
    (catalog / path).write_bytes(b"other")
    assert environment.run("os", more=own).endswith("(its checksum): nothing was written")
    (catalog / path).unlink()
    assert environment.run("os", more=own).endswith("nothing was written")
    with environment.disk.open("rb") as file:
        assert file.read(4) == b"old!"


@pytest.mark.parametrize(
    ("there", "outcome"),
    [
        ((), "hvmgr: got"),
        (("vhd", "unfinished"), "hvmgr: got"),  # the power went off before anybody could start from it
        (("vhd",), "hvmgr: disk has os.vhd already"),  # whoever put it there
        (("vhd", "entry", "loaders"), "hvmgr: disk has os.vhd already"),
        (("vhd", "entry", "unfinished", "loaders"), "hvmgr: disk has os.vhd already"),
        (("vhd", "entry"), "hvmgr: loaders"),
        (("vhd", "entry", "unfinished"), "hvmgr: loaders"),
    ],
)
def test_image_that_is_there_stays_unless_nobody_can_have_started_from_it(tmp_path, there, outcome):
    (tmp_path / "volume" / "VHD" / "os.vhd.boot").mkdir(parents=True)
    (tmp_path / "volume" / "boot" / "grub").mkdir(parents=True)
    for one, path, text in (
        ("vhd", "VHD/os.vhd", "data"),
        ("unfinished", "VHD/os.vhd.boot/unfinished", ""),
        ("entry", "boot/grub/custom.cfg", "### BEGIN hvmgr 12 ###\n### END hvmgr 12 ###\n"),
    ):
        if one in there:
            (tmp_path / "volume" / path).write_text(text)
    (tmp_path / "disk").write_bytes(b"\x33\xc0".ljust(512) if "loaders" in there else b"\xcd\x18".ljust(512, b"\0"))
    folder = settings.netboot_folder()
    native = (folder / "native").read_text().replace("/volume/", f"{tmp_path}/volume/")
    text = f"""
        cd {shlex.quote(str(tmp_path))}
        run=. disk=disk disk_size=512 volume=none vhd=os.vhd id=12 overwrite=
        . {folder}/functions
        {native}
        say() {{ echo "hvmgr: $1"; }}
        fail() {{ say "$1"; exit; }}
        gunzip() {{ say "loaders"; }}
        dd() {{ case $* in if=disk*) command dd "$@" ;; *of=disk2*) cat ;; esac; }}
        open_volume() {{ :; }}
        close_volume() {{ :; }}
        require_room() {{ fail "got"; }}
        place_image
    """
    told = subprocess.run([initramfs.BUSYBOX, "sh", "-c", text], check=True, capture_output=True, text=True, timeout=20)
    assert told.stdout.startswith(outcome), told


def test_machines_own_disk_is_not_one_that_was_plugged_in(tmp_path):
    devices = tmp_path / "devices"
    for place, facts in {
        "pci0/ata1/sda": {"device/wwid": "t10.ATA     DISK  1 \n", "device/vpd_pg80": "\0\x80\0\x06  AB12"},
        "pci0/usb1/1-1/sdb": {},
        "pci0/mmc0/mmcblk0": {"device/type": "SD\n"},
        "pci0/nvme0c0n1": {"hidden": "1\n"},
        "pci0/nvme0n1": {"serial": "S1\n", "wwid": "eui.0025\n"},
    }.items():
        same = {"removable": "0\n", "ro": "0\n", "size": "8\n", "queue/logical_block_size": "512\n"}
        for name, text in (same | facts).items():
            file = devices / place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode("latin-1"))
        (tmp_path / "sys" / "block").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / "block" / Path(place).name).symlink_to(devices / place)
    script = (settings.netboot_folder() / "devices").read_text().replace("/sys/block", f"{tmp_path}/sys/block")

    def found(wanted=""):
        text = f'set -f -o pipefail\n{script}\nfail() {{ echo "$1"; exit; }}; wanted={wanted}; find_disk; echo $disk'
        told = subprocess.run(
            [initramfs.BUSYBOX, "sh", "-c", text], check=True, capture_output=True, text=True, timeout=20
        )
        assert not told.stderr
        return told.stdout.strip()

    assert found() == "the machine has several disks (nvme0n1 sda): say which one with --disk"
    for wanted in ("nvme0n1", "S1", "eui.0025"):
        assert found(wanted) == "/dev/nvme0n1"
    for wanted in ("sda", "AB12", "t10.ATA_DISK_1"):
        assert found(wanted) == "/dev/sda"
    assert found("sdb") == "/dev/sdb"
    assert found("0025") == "the machine has no disk 0025; it has: mmcblk0 nvme0n1 sda sdb (see --disk)"
    (tmp_path / "sys" / "block" / "sda").unlink()
    assert found() == "/dev/nvme0n1"
    (tmp_path / "sys" / "block" / "nvme0n1").unlink()
    assert found() == "the machine has no disk of its own; it has: mmcblk0 sdb (see --disk)"


def test_handing_out_touches_only_its_own_files(hvmgr, quickly, catalog, kernel, tmp_path):
    """An image may be called as anything in the folder is, and what somebody else keeps there stays."""
    words = ("--catalog", catalog)
    (tmp_path / "kernel.raw").write_bytes(b"data".ljust(512))
    assert hvmgr("catalog", "add", tmp_path / "kernel.raw", *words).code == 0
    (catalog / "netboot" / "tftp").mkdir(parents=True)
    (catalog / "netboot" / "tftp" / "undionly.kpxe").write_bytes(b"iPXE")
    told = hvmgr("catalog", "netboot", "--url", URL, *kernel, *words)
    assert told.code == 0, told
    assert read_order(order_of(catalog, "kernel"))["how"] == "expand"
    assert (catalog / "netboot" / "tftp" / "undionly.kpxe").exists()


def test_address_comes_with_the_domain_that_names_are_looked_up_in():
    text = (settings.netboot_folder() / "dhcp").read_text().replace("/etc/resolv.conf", "/dev/stdout")
    told = subprocess.run(
        [initramfs.BUSYBOX, "sh", "-c", f"ip() {{ :; }}; {text}", "dhcp", "bound"], check=True, capture_output=True, text=True,
        env={"ip": "10.0.0.2", "interface": "eth0", "dns": "10.0.0.1", "domain": "example.org"}, timeout=20,
    )  # fmt: skip
    assert told.stdout == "search example.org\nnameserver 10.0.0.1\n"


@pytest.mark.guest
@pytest.mark.timeout(600)
def test_machine_that_starts_over_the_network_gets_a_vhd_and_its_entry_once(
    hvmgr, catalog, system, counting_guest, tmp_path, serve, require_program
):
    require_program("qemu-system-x86_64")
    words = ("--catalog", catalog)
    assert hvmgr("catalog", "add", system, "--name", "os", *words).code == 0
    asked = []
    url = f"http://10.0.2.2:{serve(catalog, asked=asked)}"
    kernel = ("--kernel", counting_guest.kernel, "--modules", mini.netboot_modules(counting_guest, tmp_path))
    console = f"{mini.ARGUMENTS} lsm="
    told = hvmgr(
        "catalog", "netboot", "--url", url, "--default", "os", "--timeout", "0", "--append", console, *kernel, *words
    )  # fmt: skip
    assert told.code == 0, told
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(160 * MIB)
    own = bare_machine.Machine([(disk, "raw", True)], 192 * MIB, boot_url=f"{url}/netboot/boot.ipxe")
    lines = bare_machine.lines(own, tmp_path, time_s=500)
    said = machine.listen(lines, "Enter starts").lines
    assert any("hvmgr: os is on /dev/vda" in one for one in said), said
    with partitions.File(disk) as raw:
        table = partitions.read(raw)
        assert [one.start for one in table.partitions] == [40 * 512, MIB, 37 * MIB]
        files = ext.FileSystem(raw, 37 * MIB, "the machine's volume")
        assert files.read("/VHD/os.vhd") == system.read_bytes()
        (entry,) = boot_menu.entries(files.read("/boot/grub/custom.cfg").decode())
        supplement = files.read("/VHD/os.vhd.boot/supplement")
        assert files.read("/VHD/os.vhd.boot/layer") == bytes(layer.size_for(SIZE))
        assert b"custom.cfg" in files.read("/boot/grub/grub.cfg")
    volume = subprocess.run(
        ["dumpe2fs", "-h", f"{disk}?offset={37 * MIB}"], check=True, capture_output=True, text=True, env=mini.WITH_SBIN, timeout=20
    ).stdout  # fmt: skip
    assert entry.volume in volume
    (path,) = re.findall(r" (\S+) os\.vhd\.boot/supplement", read_order(order_of(catalog, "os"))["files"])
    served = (catalog / path).read_bytes()
    assert supplement.startswith(served)
    assert f"host=UUID={entry.volume}\n".encode() in supplement[len(served) :]
    head = disk.read_bytes()[: 2 * MIB]
    code, core = grub.at_sector(*grub.bios_loader("(,gpt3)/boot/grub", tmp_path), 40)
    assert head[:440] == code.ljust(440, b"\0")
    assert head[40 * 512 :].startswith(core)
    # The firmware starts the network first at the next power-on, too.
    with disk.open("r+b") as file:
        file.write(SPEAKING)
    asked.clear()
    assert "the disk has started" in machine.listen(bare_machine.lines(own, tmp_path, time_s=200), None).lines
    assert asked == ["/netboot/boot.ipxe"]
