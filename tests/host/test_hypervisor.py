from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from hvmgr.errors import Busy, Conflict, HostFailed, Unsupported, UsageError
from hvmgr.host import hypervisor
from hvmgr.host.hypervisor import State

PROJECT = Path(__file__).parents[2]


def python(code, *arguments, **options):
    """A child process that runs code with hvmgr at hand."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


OPEN_AND_START = """
    import sys
    from hvmgr.host import hypervisor
    uri, *xmls = sys.argv[1:]
    with hypervisor.opened(uri, wait_s=60) as connection:
        for xml in xmls:
            connection.define(xml).start()
        print("up", flush=True)
        sys.stdin.readline()
"""

OPEN_AND_LIST = """
    import sys
    from hvmgr.host import hypervisor
    with hypervisor.opened(sys.argv[1], wait_s=float(sys.argv[2])) as connection:
        print(*(f"{domain.name}={domain.state()}" for domain in connection.domains()))
"""


@pytest.fixture
def root(new_embed_root):
    return new_embed_root()


# Addresses


@pytest.mark.parametrize(
    "uri",
    [
        "qemu+ssh://host/system",
        "qemu://host/system",
        "qemu+tcp:///system",
        "qemu+tls:///system",
        "xen:///system",
        "test:///default",
        "",
    ],
)
def test_uri_beyond_this_hosts_qemu_is_unsupported(uri):
    with pytest.raises(Unsupported):
        hypervisor.parse_uri(uri)


@pytest.mark.parametrize(
    "uri",
    ["qemu:///", "qemu:///nothing", "qemu:///embed", "qemu:///embed?root=relative", f"qemu:///embed?root=/{'x' * 60}"],
)
def test_malformed_uri_is_a_usage_error(uri):
    with pytest.raises(UsageError):
        hypervisor.parse_uri(uri)


@pytest.mark.parametrize(
    ("uri", "driver", "root"),
    [
        ("qemu:///system", hypervisor.Driver.SYSTEM, None),
        ("qemu:///session", hypervisor.Driver.SESSION, None),
        ("qemu+unix:///system?socket=/run/x", hypervisor.Driver.SYSTEM, None),
        ("qemu:///embed?root=/srv/a%20b", hypervisor.Driver.EMBED, Path("/srv/a b")),
    ],
)
def test_uri_of_this_host(uri, driver, root):
    assert hypervisor.parse_uri(uri) == hypervisor.Address(uri, driver, root)


def test_no_daemon_names_the_service_to_start(folder):
    with pytest.raises(HostFailed, match="cannot connect") as caught:
        hypervisor.connect(f"qemu+unix:///system?socket={folder}/none", wait_s=0)
    assert "systemctl start" in caught.value.hint


# The embedded driver and other processes


def test_import_alone_does_not_load_libvirt():
    code = "import sys; from hvmgr.host import hypervisor; assert 'libvirt' not in sys.modules"
    process = python(code)
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 0)


def test_process_with_a_connection_left_open_ends_silently(root):
    process = python(
        "import sys\nfrom hvmgr.host import hypervisor\nx = hypervisor.connect(sys.argv[1], wait_s=5)", uri(root)
    )
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), 0)


def test_second_process_waits_for_the_root(root):
    first = python(OPEN_AND_START, uri(root))
    assert first.stdout.readline() == "up\n"
    second = python(OPEN_AND_LIST, uri(root), 60)
    time.sleep(1)
    assert second.poll() is None
    first.communicate("\n", timeout=60)
    assert (second.communicate(timeout=60), second.returncode) == (("\n", ""), 0)


def test_second_process_gives_up_as_busy(embed_root, connection):
    process = python(OPEN_AND_LIST, uri(embed_root), 0.3)
    _, errors = process.communicate(timeout=60)
    assert f"{Busy.__name__}: process {os.getpid()} uses {embed_root}" in errors


def test_second_root_in_one_process_is_a_conflict(connection, root):
    with pytest.raises(Conflict, match="another embedded root"):
        hypervisor.connect(uri(root), wait_s=0)


def test_guests_of_a_killed_process_are_attached_and_dead_ones_are_off(root, make_xml):
    first = python(OPEN_AND_START, uri(root), *(make_xml(name) for name in ("a", "b", "c")))
    assert first.stdout.readline() == "up\n", first.stderr.read()
    first.kill()
    first.communicate(timeout=60)
    os.kill(int((root / "run/qemu/b.pid").read_text()), 9)
    second = python(OPEN_AND_LIST, uri(root), 60)
    assert second.communicate(timeout=90) == ("a=running b=off c=running\n", "")


def test_guest_that_libvirt_cannot_attach_is_an_error(root, make_xml):
    first = python(OPEN_AND_START, uri(root), make_xml("a"))
    assert first.stdout.readline() == "up\n"
    first.kill()
    first.communicate(timeout=60)
    (root / "run/qemu/a.xml").write_text("<damaged/>")
    second = python(OPEN_AND_LIST, uri(root), 0.5)
    assert "does not attach these running guests again: a" in second.communicate(timeout=90)[1]


def test_private_root_is_refused(folder):
    folder.chmod(0o700)
    with pytest.raises(UsageError, match="cannot enter"):
        hypervisor.connect(uri(folder), wait_s=0)


# Capabilities and folders


def test_capabilities(connection):
    facts = connection.capabilities()
    assert facts.arch in facts.emulators
    assert facts.qemu_owner is not None
    assert all(part.isdigit() for part in f"{facts.libvirt_version}.{facts.qemu_version}".split("."))
    assert facts.machines[facts.arch]["q35"].startswith("pc-q35-")


def test_machine_facts(connection):
    facts = connection.machine_facts(arch="x86_64", accel="qemu", machine="pc")
    assert facts.machine.startswith("pc-i440fx-")
    assert facts.emulator.is_file()
    assert "virtio" in facts.disk_buses


def test_machine_facts_of_an_unknown_machine_are_unsupported(connection):
    with pytest.raises(Unsupported, match="nonsense"):
        connection.machine_facts(arch="x86_64", accel="qemu", machine="nonsense")


def test_managed_save_is_where_it_is_said_to_be(connection, make_xml):
    domain = connection.define(make_xml("guest"))
    domain.start()
    domain.managed_save()
    assert domain.state() is State.SAVED
    assert connection.managed_save_path("guest").is_file()
    domain.remove_managed_save()
    assert domain.state() is State.OFF
    assert not connection.managed_save_path("guest").exists()


# Domains


def test_domain_is_found_by_uuid_and_name(connection, make_xml):
    domain = connection.define(make_xml("guest"))
    assert connection.find_domain(domain.uuid).name == "guest"
    assert connection.find_domain_by_name("guest").uuid == domain.uuid
    assert [found.name for found in connection.domains()] == ["guest"]


def test_absent_domain_is_none(connection):
    assert connection.find_domain(str(uuid.uuid4())) is None
    assert connection.find_domain_by_name("nobody") is None


def test_define_again_changes_the_same_domain(connection, make_xml):
    xml = make_xml("guest")
    connection.define(xml)
    domain = connection.define(xml.replace(">64<", ">96<"))
    assert "98304" in domain.xml(live=False)
    assert len(connection.domains()) == 1


def test_define_of_a_taken_name_is_a_conflict(connection, make_xml):
    connection.define(make_xml("guest"))
    with pytest.raises(Conflict, match="already exists"):
        connection.define(make_xml("guest"))


@pytest.mark.parametrize("xml", ["<domain", "<domain type='qemu'/>", "<network/>"], ids=["broken", "empty", "other"])
def test_define_of_wrong_xml_is_a_usage_error(connection, xml):
    with pytest.raises(UsageError, match="cannot define the VM"):
        connection.define(xml)


def test_restore_of_something_else_fails(connection, make_xml, folder):
    (folder / "file").write_bytes(bytes(4096))
    with pytest.raises(HostFailed, match="cannot restore"):
        connection.restore(folder / "file", make_xml("guest"), running=True)


def test_closed_connection_refuses(embed_root):
    connection = hypervisor.connect(uri(embed_root), wait_s=5)
    connection.close()
    connection.close()
    with pytest.raises(HostFailed, match="closed"):
        connection.domains()


def uri(root):
    return f"qemu:///embed?root={root}"
