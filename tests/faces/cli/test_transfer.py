"""Single disks on the command line: ``disk export``, ``disk import``, Xen's words for them, and the page about both."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hvmgr import vhd
from tests.operations.rules.conftest import run
from tests.operations.rules.conftest import write as write_image

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "transfer.md").read_text("utf-8")
CHANGE = "# … the VM runs and writes …"
NOWHERE = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def there(root):
    """A folder beside the homes."""
    folder = root.parent / "there"
    folder.mkdir()
    return folder


def image_of(hvmgr, vm):
    return hvmgr.ok("disk", "info", vm, "vda", "--json").json["chain"][0]["path"]


def bytes_of(path, folder):
    run("qemu-img", "convert", "-O", "raw", "-f", "qcow2", path, folder / "raw.part")
    data = (folder / "raw.part").read_bytes()
    (folder / "raw.part").unlink()
    return data


@pytest.fixture
def written(hvmgr, vm):
    """A VM with a snapshot and a change since."""
    write_image(image_of(hvmgr, vm), 0x11)
    hvmgr.ok("snapshot", "create", vm, "one")
    write_image(image_of(hvmgr, vm), 0x22, 1 << 20)
    return vm


def test_disk_goes_out_and_comes_back(hvmgr, written, there):
    held = bytes_of(image_of(hvmgr, written), there)
    full, delta = there / "full.vhd", there / "delta.vhd"
    told = hvmgr.ok("disk", "export", written, "vda", full, "--snapshot", "one").out
    assert told == f"exported disk vda of snapshot 'one' of {written} to {full} (2.0 MiB)\n"
    document = hvmgr.ok("disk", "export", written, "vda", delta, "--base", "one", "--json").json
    assert document["length"] == delta.stat().st_size
    assert stat.S_IMODE(delta.stat().st_mode) == 0o600
    with vhd.open_image(full) as image:
        assert document["base"].replace("-", "") == image.uid.hex()
    hvmgr.ok("vm", "create", "copy", "--memory", "64M", "--disk", "8M", "--network", "none", "--accel", "tcg")
    hvmgr.ok("disk", "import", "copy", "vda", full)
    assert hvmgr.ok("disk", "import", "copy", "vda", delta).out == f"imported {delta} into disk vda of copy\n"
    assert bytes_of(image_of(hvmgr, "copy"), there) == held
    answer = hvmgr("disk", "import", "copy", "vda", delta)
    assert answer.code == 4
    assert "is a delta on" in answer.err
    assert "--force" in answer.err
    hvmgr.ok("disk", "import", "copy", "vda", delta, "--force")
    assert bytes_of(image_of(hvmgr, "copy"), there) == held


@pytest.mark.parametrize("name", ["disk.raw", "disk.qcow2"])
def test_name_of_the_file_says_the_format(hvmgr, written, there, name):
    held = bytes_of(image_of(hvmgr, written), there)
    hvmgr.ok("disk", "export", written, "vda", there / name)
    if name.endswith("raw"):
        assert (there / name).read_bytes() == held
        assert (there / name).stat().st_blocks * 512 < 1 << 20, "zeros are holes"
    write_image(image_of(hvmgr, written), 0x99, 2 << 20)
    hvmgr.ok("disk", "import", written, "vda", there / name)
    assert bytes_of(image_of(hvmgr, written), there) == held


def test_progress_without_a_terminal_is_lines(hvmgr, written, there):
    answer = hvmgr("disk", "export", written, "vda", there / "a.vhd", "--progress")
    assert answer.code == 0
    assert re.search(r"^export disk vda of \w+: 100 %, 0 s left$", answer.err, re.MULTILINE)
    assert re.search(r"^Total time: \d+\.\d s$", answer.err, re.MULTILINE)
    answer = hvmgr("disk", "import", written, "vda", there / "a.vhd", "--progress")
    assert re.search(r"^import .*a.vhd: 100 %", answer.err, re.MULTILINE)


def test_dry_run_changes_nothing(hvmgr, written, there):
    (there / "a.vhd").write_bytes(b"")
    hvmgr.ok("disk", "export", written, "vda", there / "b.vhd", "--dry-run")
    assert not (there / "b.vhd").exists()
    hvmgr.ok("disk", "export", written, "vda", there / "full.vhd", "--snapshot", "one")
    told = hvmgr.ok("disk", "import", written, "vda", there / "full.vhd", "--dry-run").out
    assert "write what arrives into image" in told
    for words in (("vdi-create", "virtual-size=1M"), ("vdi-list",)):
        hvmgr.ok(*words, "--dry-run")
    assert len(hvmgr.ok("vdi-list").lines) == 2


def test_file_that_is_there_is_compared_by_its_bytes(hvmgr, written, there):
    files = [there / name for name in ("now.vhd", "now.raw", "now.qcow2", "delta.vhd")]

    def export(file, how, *more):
        base = ("--base", "one") if file.stem == "delta" else ()
        return hvmgr("disk", "export", written, "vda", file, *base, "--if-exists", how, *more)

    for file in files:
        made = export(file, "same", "--json").json
        assert made["changed"] is True
        assert export(file, "same", "--json").json == made | {"changed": False}
        assert export(file, "same", "--dry-run", "--json").json["plan"] is None
    before = [file.stat().st_mtime_ns for file in files]
    write_image(image_of(hvmgr, written), 0x33, 1 << 20)
    for file in files:
        answer = export(file, "same")
        assert (answer.code, "is not what would be written" in answer.err) == (4, True)
    assert export(files[0], "same", "--dry-run").code == 4
    assert export(files[0], "keep").out == f"{files[0]} is there already\n"
    assert [file.stat().st_mtime_ns for file in files] == before
    files[0].unlink()
    os.mkfifo(files[0])
    assert export(files[0], "same").code == 4, "a pipe is never opened"
    hvmgr.ok("snapshot", "create", written, "two")
    assert export(files[3], "keep").code == 0
    assert export(files[3], "same", "--snapshot", "two").code == 4, "another point"


def disk_of(hvmgr, vm):
    return hvmgr.ok("vdi-list", f"vm-name-label={vm}", "kind=slot", "--minimal").out.strip()


REFUSED = [
    (("disk", "export", "VM", "vda", "THERE/there.vhd"), 4, "exists already"),
    (("disk", "export", "VM", "vda", "THERE/no/a.vhd"), 3, "no folder"),
    (("disk", "export", "VM", "vdz", "THERE/a.vhd"), 3, "no disk 'vdz'"),
    (("disk", "export", "VM", "vda", "THERE/a.vhdx"), 2, "vhdx"),
    (("disk", "export", "VM", "vda", "THERE/a.vhd", "--base", "two"), 3, "no snapshot 'two'"),
    (("disk", "export", "VM", "vda", "THERE/a.raw", "--base", "one"), 2, "not as raw"),
    (("disk", "export", "VM", "vda", "THERE/a.vhd", "--snapshot", "one", "--base", "one"), 2, "its own base"),
    (("disk", "export", "VM", "vda", "-", "--json"), 2, "both go to stdout"),
    (("disk", "export", "VM", "vda", "-", "--if-exists", "same"), 2, "stdout"),
    (("disk", "export", "VM", "vda", "THERE/there.vhd", "--dry-run"), 4, "exists already"),
    (("disk", "import", "VM", "vda", "THERE/none.vhd"), 3, "none.vhd"),
    (("disk", "import", "VM", "vda", "THERE"), 2, "folder"),
    (("disk", "import", "VM", "vda", "THERE/there.vhd"), 6, "there.vhd is no VHD"),
    (("disk", "import", "VM", "vda", "/etc/passwd"), 6, "state its format: raw or qcow2"),
    (("disk", "import", "VM", "vda", "THERE/there.vhd", "--format", "qcow2"), 6, "there.vhd"),
    (("disk", "import", "VM", "vda", "THERE/big.raw"), 4, "has 8388608"),
    (("vdi-export", f"uuid={NOWHERE}", "filename=THERE/a"), 3, "there is no disk"),
    (("vdi-export", "uuid=DISK", f"base={NOWHERE}", "filename=THERE/a", "format=vhd"), 3, "there is no disk"),
    (("vdi-export", "uuid=DISK", "filename=THERE/a", "format=tar"), 2, "'tar' is no format"),
    (("vdi-export", "uuid=DISK"), 2, "filename= is missing"),
    (("vdi-export", "uuid=DISK", "filename=THERE/a", "bas=x"), 2, "no key 'bas'"),
    (("vdi-export", "uuid=DISK", "uuid=DISK", "filename=THERE/a"), 2, "twice"),
    (("vdi-export", "DISK", "filename=THERE/a"), 2, "no KEY=VALUE"),
    (("vdi-import", "uuid=DISK", "filename=THERE/none"), 3, "none"),
    (("vdi-create", "name-label=x"), 2, "virtual-size= is missing"),
    (("vdi-create", "virtual-size=many"), 2, "is not a size"),
    (("vdi-create", "virtual-size=0"), 2, "cannot have 0 bytes"),
    (("vdi-destroy", "uuid=DISK"), 4, "is disk vda of"),
    (("vdi-snapshot", "uuid=1"), 2, "is no uuid"),
]  # fmt: skip


def test_bad_input_is_one_sentence_and_changes_nothing(hvmgr, written, there):
    (there / "there.vhd").write_bytes(b"no disk at all")
    with (there / "big.raw").open("wb") as file:
        file.truncate(9 << 20)
    disk, before = disk_of(hvmgr, written), Path(image_of(hvmgr, written)).read_bytes()
    for words, code, said in REFUSED:
        meant = [{"VM": written}.get(one, one.replace("THERE", str(there)).replace("DISK", disk)) for one in words]
        answer = hvmgr(*meant)
        heard = answer.json["error"]["message"] if "--json" in words else answer.err
        assert (answer.code, said in heard) == (code, True), (words, answer)
        assert "--json" in words or answer.out == ""
    assert sorted(path.name for path in there.iterdir()) == ["big.raw", "there.vhd"]
    assert Path(image_of(hvmgr, written)).read_bytes() == before


def test_vdi_list_chooses_and_names(hvmgr, written):
    disk = disk_of(hvmgr, written)
    alone = hvmgr.ok("vdi-snapshot", f"uuid={disk}", "name-label=nightly").out.strip()
    free = hvmgr.ok("vdi-create", "virtual-size=4MiB", "name-label=spare", "sr-uuid=any", "type=user").out.strip()
    rows = {line[0]: line for line in hvmgr.ok("vdi-list").lines}
    assert rows[disk][1:4] == ["slot", f"{written} vda", str(8 << 20)]
    assert rows[alone][1:3] == ["disk-snapshot", "nightly"]
    assert rows[alone][7] == disk
    assert rows[free][1:4] == ["free", "spare", str(4 << 20)]
    assert hvmgr.ok("vdi-list", "name-label=spare", "--minimal").out == f"{free}\n"
    assert hvmgr.ok("vdi-list", f"snapshot-of={disk}", "kind=disk-snapshot", "--json").json["vdis"][0]["uuid"] == alone
    assert hvmgr.ok("vdi-destroy", f"uuid={alone}").out == f"destroyed {alone}\n"
    assert hvmgr.ok("vdi-destroy", f"uuid={free}", "--json").json["changed"] is True


# --- the page, run as it stands ----------------------------------------------------------------------------------------


class Shell:
    """A shell in which ``hvmgr`` works on a host of its own."""

    def __init__(self, root, folder):
        self.folder = folder
        self.environment = os.environ | {
            "LIBVIRT_DEFAULT_URI": f"qemu:///embed?root={root}",
            "HVMGR_ROOT": str(folder / "homes"),
            "HVMGR_INDEX": str(folder / "index"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def __call__(self, script):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def image(self, vm):
        """The working image, by the home's own file."""
        (home,) = (self.folder / "homes" / vm / "Virtual Machines").glob("*.xml")
        return re.findall(r"<source file=.([^'\"]+)", home.read_text())[0]


@pytest.fixture(scope="module")
def shell(new_embed_root):
    """Two VMs of one size, of which the first holds data."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    shell = Shell(new_embed_root(), folder)
    for name in ("t1", "t2"):
        shell(f"hvmgr vm create {name} --memory 64M --disk 8M --network none --accel tcg")
    write_image(shell.image("t1"), 0x11)
    yield shell
    shutil.rmtree(folder)


@pytest.fixture
def here(shell):
    """Where the shell is; streams of earlier scripts are gone."""
    for old in [*shell.folder.glob("*.vhd"), *shell.folder.glob("*.raw")]:
        old.unlink()
    return shell.folder


def on_page(name):
    """A script of the page in which somebody writes in the middle."""
    (script,) = re.findall(rf"<!-- run: {name} -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    assert CHANGE in script
    return script


def change(script, command):
    return script.replace(CHANGE, command)


WRITE = """qemu-io -f qcow2 -c 'write -P PATTERN 4M 64k' "$(sed -n "s/.*<source file='\\([^']*\\)'.*/\\1/p" homes/t1/Virtual*/*.xml)\""""


def test_backup_and_restore_of_the_page(shell, here):
    shell(change(on_page("backup"), WRITE.replace("PATTERN", "0x22")))
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", shell.image("t1"), shell.image("t2"))
    assert (here / "delta.vhd").stat().st_size < (2 << 20) + 8192, "the size of the blocks that changed"


def test_xens_words_of_the_page(shell, here):
    script = change(on_page("xen"), WRITE.replace("PATTERN", "0x33"))
    shell(f"{script}\nhvmgr vdi-export uuid=$NEW filename=new.raw")
    assert (here / "new.raw").read_bytes() == bytes_of(shell.image("t1"), here)


def test_pipes_carry_disks(shell, here):
    """Out of stdout, into stdin; nobody at the other end is said."""
    write_image(shell.image("t1"), 0x44)
    shell(
        "hvmgr disk export t1 vda - --format raw | cat > a.raw && cat a.raw | hvmgr disk import t2 vda - --format raw"
    )
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", shell.image("t1"), shell.image("t2"))
    script = "{ hvmgr disk export t1 vda - --format raw; echo $? > code; } | head -c 10 > /dev/null; cat code"
    assert shell(f"set +e +o pipefail; {script}").strip() == "130"


def arrived(here):
    """Whether some of it stands in the new image."""
    return any(path.stat().st_size > 4 << 20 for path in here.glob("homes/t2/Snapshots/*/*.qcow2"))


def test_killed_import_leaves_the_disk_as_it_was(shell, here):
    os.mkfifo(here / "slow")
    before = bytes_of(shell.image("t2"), here)
    command = [str(Path(sys.executable).parent / "hvmgr"), "disk", "import", "t2", "vda", "slow", "--format", "raw"]
    importing = subprocess.Popen(command, cwd=here, env=shell.environment, start_new_session=True)
    with (here / "slow").open("wb", buffering=0) as fifo:
        for _ in range(6):
            fifo.write(b"x" * (1 << 20))
        deadline = time.monotonic() + 60
        while not arrived(here) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert arrived(here)
        importing.kill()
        importing.wait(60)
    shell("hvmgr snapshot list t2")  # whoever looks undoes it
    assert bytes_of(shell.image("t2"), here) == before
    assert not arrived(here)
    assert not (here / "homes/t2/.hvmgr/journal").exists()
