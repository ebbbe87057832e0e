from __future__ import annotations

import contextlib
import os
import subprocess
import threading

import pytest
from lxml import etree

from hvmgr.errors import Conflict, HostFailed, HvmgrError, NoSpace, NotFound
from hvmgr.host.hypervisor import State


@pytest.fixture
def base(make_image):
    return make_image("base.qcow2")


@pytest.fixture
def domain(connection, make_xml, base):
    return connection.define(make_xml("guest", [("vda", "qcow2", base)]))


def source_of(xml):
    return [node.get("file") for node in etree.fromstring(xml).iterfind("devices/disk/source")]


def repointed(xml, old, new):
    """The XML with another image in place of an old one, and without the chain that libvirt had resolved."""
    root = etree.fromstring(xml)
    for disk in root.iterfind("devices/disk"):
        for chain in disk.findall("backingStore"):
            disk.remove(chain)
    return etree.tostring(root, encoding="unicode").replace(str(old), str(new))


@contextlib.contextmanager
def pipe_that_waits(path):
    """Makes a pipe that takes no more than its buffer until the yielded function is called, then everything."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    flow, end = threading.Event(), threading.Event()

    def read():
        flow.wait()
        while not end.wait(0.005):
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 1 << 20)

    thread = threading.Thread(target=read)
    thread.start()
    yield flow.set
    flow.set()
    end.set()
    thread.join()
    os.close(reader)


@pytest.fixture
def small_disk(folder):
    """A file system of its own with 256 KiB."""
    place = folder / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0711", "tmpfs", str(place)]
    if subprocess.run(command, check=False, timeout=60, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=60)


def test_start_suspend_resume_destroy_show_their_states(domain):
    assert domain.state() is State.OFF
    domain.start()
    assert domain.state() is State.RUNNING
    domain.suspend()
    assert domain.state() is State.PAUSED
    domain.resume()
    assert domain.state() is State.RUNNING
    domain.destroy()
    assert domain.state() is State.OFF


def test_start_paused(domain):
    domain.start(paused=True)
    assert domain.state() is State.PAUSED


def test_destroy_of_a_stopped_domain_is_fine(domain):
    domain.destroy()
    assert domain.state() is State.OFF


def test_start_of_a_running_domain_is_a_conflict(domain):
    domain.start()
    with pytest.raises(Conflict, match="already running"):
        domain.start()


def test_call_on_an_undefined_domain_is_not_found(domain):
    domain.undefine()
    with pytest.raises(NotFound):
        domain.start()


@pytest.mark.parametrize(("running", "state"), [(True, State.RUNNING), (False, State.PAUSED)], ids=["run", "pause"])
def test_save_and_restore(connection, domain, folder, running, state):
    domain.start()
    xml = domain.migratable_xml()
    domain.save(folder / "memory.save")
    assert domain.state() is State.OFF
    connection.restore(folder / "memory.save", xml, running=running)
    assert domain.state() is state


def test_save_reports_progress(domain, folder):
    calls = []
    domain.start()
    domain.save(folder / "memory.save", progress=lambda done, total: calls.append((done, total)))
    assert all(done <= total or total == 0 for done, total in calls)


def test_interrupted_save_leaves_the_guest_running(connection, make_xml, folder):
    def interrupt(_done, _total):
        flow()
        raise KeyboardInterrupt

    # 1 GiB of zero pages gives a stream of 2.3 MB: more than all buffers on its way
    domain = connection.define(make_xml("guest").replace("'MiB'>64<", "'MiB'>1024<"))
    domain.start()
    with pipe_that_waits(folder / "pipe") as flow, pytest.raises(KeyboardInterrupt):
        domain.save(folder / "pipe", progress=interrupt)
    assert domain.state() is State.RUNNING
    domain.save(folder / "memory.save")
    assert domain.state() is State.OFF


def test_switch_disks_alone(domain, base, make_image):
    child = make_image("child.qcow2", backing=base)
    domain.start()
    domain.switch_disks({"vda": child})
    assert source_of(domain.xml(live=False)) == [str(child)]
    assert source_of(domain.xml(live=True)) == [str(child)]
    assert domain.writable_files() == {child}
    assert domain.snapshot_count() == 0


def test_file_of_a_switch_that_never_came_is_not_written_and_can_be_closed(domain, base, make_image):
    child = make_image("child.qcow2", backing=base)
    child.chmod(0o666)
    domain.start()
    domain.monitor("blockdev-add", node_name="libvirt-2-storage", driver="file", filename=str(child))
    domain.monitor("blockdev-add", node_name="libvirt-2-format", driver="qcow2", file="libvirt-2-storage", backing=None)
    assert domain.writable_files() == {base}
    with pytest.raises(HostFailed, match="Duplicate"):
        domain.switch_disks({"vda": child})
    domain.close_unused(base)  # in use: stays open
    domain.close_unused(child)
    domain.switch_disks({"vda": child})
    assert domain.writable_files() == {child}


def test_switch_disks_with_memory_restores_on_another_child(connection, domain, base, make_image, folder):
    first, second = make_image("first.qcow2", backing=base), make_image("second.qcow2", backing=base)
    domain.start()
    xml = domain.migratable_xml()
    domain.switch_disks({"vda": first}, memory=folder / "memory.save")
    assert domain.state() is State.RUNNING
    domain.destroy()
    connection.restore(folder / "memory.save", xml.replace(str(base), str(second)), running=True)
    assert domain.writable_files() == {second}


def test_switch_leaves_the_other_slots(connection, make_xml, make_image):
    one, two = make_image("one.qcow2"), make_image("two.raw", "raw")
    child = make_image("child.qcow2", backing=one)
    domain = connection.define(make_xml("guest", [("vda", "qcow2", one), ("vdb", "raw", two)]))
    domain.start()
    assert domain.writable_files() == {one, two}
    domain.switch_disks({"vda": child}, others=["vdb"])
    assert domain.writable_files() == {child, two}


def test_switch_of_several_disks_is_one_step(connection, make_xml, make_image, folder):
    one, two = make_image("one.qcow2"), make_image("two.raw", "raw")
    first, second = (
        make_image("first.qcow2", backing=one),
        make_image("second.qcow2", backing=two, backing_format="raw"),
    )
    domain = connection.define(make_xml("guest", [("vda", "qcow2", one), ("vdb", "raw", two)]))
    domain.start()
    with pytest.raises(HostFailed):
        domain.switch_disks({"vda": first, "vdb": folder / "missing.qcow2"})
    assert domain.writable_files() == {one, two}
    domain.switch_disks({"vda": first, "vdb": second})
    assert domain.writable_files() == {first, second}


def test_switch_keeps_the_relative_backing_name(domain, base, make_image):
    child = make_image("child.qcow2", backing=base)
    domain.start()
    domain.switch_disks({"vda": child})
    domain.destroy()
    assert b"base.qcow2" in child.read_bytes()[:4096]
    assert str(base).encode() not in child.read_bytes()[:4096]


def test_memory_without_any_disk(connection, make_xml, folder):
    domain = connection.define(make_xml("guest"))
    domain.start()
    domain.switch_disks({}, memory=folder / "memory.save")
    assert (folder / "memory.save").stat().st_size > 0
    assert domain.state() is State.RUNNING


def test_writable_files_of_a_stopped_domain_are_none(domain):
    assert (domain.writable_files(), domain.open_files()) == (set(), set())


def test_running_domain_that_does_not_say_its_files_is_an_error(domain, monkeypatch):
    """As against one that ended after somebody saw it running."""
    monkeypatch.setattr(type(domain), "is_active", lambda _: True)
    with pytest.raises(Conflict, match="query-blockstats"):
        domain.writable_files()
    with pytest.raises(Conflict, match="query-named-block-nodes"):
        domain.open_files()


def test_writable_files_of_a_long_chain(connection, make_xml, make_image):
    # QEMU shows a chain this long as one "json:{…}" name and cuts it off
    image = make_image("0.qcow2")
    for number in range(1, 40):
        image = make_image(f"{number}-{'x' * 100}.qcow2", backing=image)
    domain = connection.define(make_xml("guest", [("vda", "qcow2", image)]))
    domain.start(paused=True)
    assert domain.writable_files() == {image}


def test_writable_files_show_the_base_of_a_running_commit(connection, domain, base, make_image):
    child = make_image("child.qcow2", backing=base)
    domain.start()
    domain.switch_disks({"vda": child})
    assert not domain.has_job()
    domain._handle().blockCommit("vda", None, None, 0, 4)  # ACTIVE: runs until it is told to end
    assert domain.has_job()
    assert domain.writable_files() == {child, base}


def test_vhd_in_the_chain_blocks_the_memory(connection, make_xml, make_image, folder):
    base = make_image("base.vhd", "vpc")
    child = make_image("child.qcow2", backing=base, backing_format="vpc")
    domain = connection.define(make_xml("guest", [("vda", "qcow2", child)]))
    domain.start()
    assert "vpc" in domain.blocked_reasons()[0]
    with pytest.raises(HvmgrError, match="vpc"):
        domain.save(folder / "memory.save")
    assert domain.state() is State.RUNNING


def test_nothing_blocks_the_memory_of_plain_qcow2(domain):
    domain.start()
    assert domain.blocked_reasons() == []


def test_managed_save_starts_on_the_disk_that_its_changed_xml_names(domain, base, make_image):
    child = make_image("child.qcow2", backing=base)
    domain.start()
    domain.managed_save()
    assert domain.has_managed_save()
    xml = domain.managed_save_xml()
    assert str(base) in xml
    domain.define_managed_save_xml(repointed(xml, base, child))
    domain.start()
    assert domain.writable_files() == {child}
    assert source_of(domain.xml(live=False)) == [str(base)]  # the configuration is another matter


def test_managed_save_xml_without_managed_save_is_a_conflict(domain):
    with pytest.raises(Conflict):
        domain.managed_save_xml()


def test_undefine_takes_the_managed_save_along(connection, domain, base):
    domain.start()
    domain.managed_save()
    domain.undefine()
    assert connection.find_domain(domain.uuid) is None
    assert not connection.managed_save_path("guest").exists()
    assert base.exists()


def test_undefine_of_a_running_domain_leaves_it_transient(connection, domain):
    domain.start()
    domain.undefine()
    assert not domain.is_persistent()
    domain.destroy()
    assert connection.find_domain(domain.uuid) is None


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "remove"])
def test_undefine_and_the_nvram(connection, make_xml, keep):
    xml = make_xml("guest").replace("<os>", "<features><acpi/></features><os firmware='efi'>").replace("'pc'", "'q35'")
    domain = connection.define(xml)
    domain.start(paused=True)
    domain.destroy()
    nvram = connection.nvram_folder() / "guest_VARS.fd"
    assert nvram.is_file()
    domain.undefine(keep_nvram=keep)
    assert nvram.exists() is keep
    nvram.unlink(missing_ok=True)


def test_rename(connection, domain):
    domain.rename("other")
    assert domain.name == "other"
    assert connection.find_domain_by_name("other").uuid == domain.uuid
    assert connection.find_domain_by_name("guest") is None


def test_rename_of_a_running_domain_is_a_conflict(domain):
    domain.start()
    with pytest.raises(Conflict):
        domain.rename("other")
    assert domain.name == "guest"


def test_shutdown_returns_without_waiting(domain):
    domain.start()
    domain.shutdown()
    assert domain.is_active()


def test_serial_path_is_a_terminal_while_it_runs(domain):
    assert domain.serial_path() is None
    domain.start(paused=True)
    assert domain.serial_path().is_char_device()


def test_libvirts_own_snapshots_are_counted(connection, domain):
    assert (domain.snapshot_count(), domain.bitmap_count()) == (0, 0)
    snapshot = domain._handle().snapshotCreateXML("<domainsnapshot><name>own</name></domainsnapshot>", 0)
    assert domain.snapshot_count() == 1
    del snapshot
    domain.undefine()
    assert connection.find_domain(domain.uuid) is None


def test_monitor_refusal_is_an_error(domain):
    domain.start(paused=True)
    with pytest.raises(HostFailed, match="nonsense"):
        domain.monitor("query-nonsense")


def test_save_into_a_missing_folder_fails_and_leaves_it_running(domain, folder):
    domain.start()
    with pytest.raises(HostFailed, match="No such file"):
        domain.save(folder / "nowhere" / "memory.save")
    assert domain.state() is State.RUNNING


def test_save_onto_a_full_disk_is_no_space_and_leaves_it_running(domain, small_disk):
    domain.start()
    with pytest.raises(NoSpace):
        domain.save(small_disk / "memory.save")
    assert domain.state() is State.RUNNING


def test_tpm_state_is_where_it_is_said_to_be(connection, make_xml):
    if not connection.machine_facts(arch="x86_64", accel="qemu", machine="q35").has_tpm_emulator:
        pytest.skip("needs swtpm and swtpm-tools")
    devices = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    domain = connection.define(make_xml("guest", devices=devices))
    domain.start(paused=True)
    folder = connection.tpm_folder(domain.uuid)
    assert list(folder.iterdir())
    domain.destroy()
    domain.undefine()
    assert folder.exists()
    connection.define(make_xml("guest", devices=devices, uuid_=domain.uuid)).undefine(keep_tpm=False)
    assert not folder.exists()
