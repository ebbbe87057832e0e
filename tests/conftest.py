"""What every test may count on: nothing of this machine is touched, and a missing program is never silent.

And the embedded libvirt driver, one root per test process.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from bench import kernel
from hvmgr.faces import guest
from hvmgr.host import hypervisor, kept_secrets, libguestfs_program
from hvmgr.operations.automatic import worker
from tests import ordinary_user, private_libvirt, shelf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_numbers = itertools.count()
_EARLY = 0.6  # how much of a run has begun with the last file that takes long

# How long an example takes says nothing on a machine that runs other tests as well.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

# A job in the background ignores SIGINT, and whatever a test interrupts would do so too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
private_libvirt.take_place_of_init()


def pytest_configure(config: pytest.Config) -> None:
    """The processes of one run share a folder, which QEMU's user can pass; it goes with the run."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="hv", dir="/tmp")
        Path(folder).chmod(0o711)
        os.environ["HVMGR_TESTS_SHARED"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with guests and kills, which mostly wait, come among those that compute; at the end are short ones only."""
    slow = {
        item.path for item in items if any(item.get_closest_marker(name) for name in ("crash", "guest", "libvirtd"))
    }
    places: dict[Path, float] = {}
    for some, share in ((slow, _EARLY), ({item.path for item in items} - slow, 1.0)):
        files = sorted(some)
        places |= {path: share * number / len(files) for number, path in enumerate(files)}
    items.sort(key=lambda item: places[item.path])


def is_complete_run() -> bool:
    """Whether everything that tests need has to be there: in continuous integration and under ``.ci/run``."""
    return os.environ.get("HVMGR_REQUIRE_ALL", "0") == "1" or os.environ.get("CI") == "true"


@pytest.fixture(scope="session")
def require() -> Callable[[bool, str], None]:
    """``require(condition, reason)``: skips with the reason at a desk, fails in a complete run."""

    def check(condition: bool, reason: str) -> None:
        if condition:
            return
        if is_complete_run():
            pytest.fail(f"{reason} (a complete run skips nothing)", pytrace=False)
        pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def require_program(require: Callable[[bool, str], None]) -> Callable[[str], Path]:
    """``require_program(name)``: the path of a program in PATH or sbin; without it as ``require``."""

    def find(name: str) -> Path:
        found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        require(found is not None, f"the program {name} is missing: make setup installs it")
        return Path(str(found))

    return find


@pytest.fixture(scope="session")
def _own_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hvmgr")


@pytest.fixture(autouse=True)
def _own_settings(_own_place: Path) -> Iterator[None]:
    """Each test has a root and a host-wide index of its own (not made yet), never those of the machine; no keys are known."""
    number = next(_numbers)
    kept_secrets._page.cache_clear()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HVMGR_ROOT", str(_own_place / f"root{number}"))
        environment.setenv("HVMGR_INDEX", str(_own_place / f"index{number}"))
        environment.setenv("HVMGR_RUN", str(_own_place / f"run{number}"))
        environment.setenv("HVMGR_CONFIG", str(_own_place / f"config{number}"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _shelf() -> Iterator[None]:
    yield
    shelf.clear()


@pytest.fixture
def ahead(monkeypatch):
    """``ahead(hours)``: the clock of what hvmgr does by itself is that much ahead of the host's."""

    def set_up(hours):
        class Clock(datetime):
            @classmethod
            def now(cls, zone=None):
                return datetime.now(zone) + timedelta(hours=hours)

        monkeypatch.setattr(worker, "datetime", Clock)

    return set_up


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder that is the same for all processes of this run."""
    return Path(os.environ["HVMGR_TESTS_SHARED"])


@pytest.fixture(scope="session")
def counting_guest(require_program):
    """The kernel and the initrd of the counting guest, from the cache, made there by the first test that asks."""
    require_program("apt-get")
    return guest.build()


@pytest.fixture
def own_kernel(counting_guest, tmp_path, monkeypatch, require_program):
    """The kernel of the counting guest, as if it were this host's: small machines of hvmgr's own start with it."""
    from hvmgr.storage import kernels

    require_program("setfattr")
    (version,) = counting_guest.modules.iterdir()
    boot = tmp_path / "boot"
    boot.mkdir()
    (boot / f"vmlinuz-{version.name}").symlink_to(counting_guest.kernel)
    monkeypatch.setattr(kernels, "BOOT", boot)
    monkeypatch.setattr(kernels, "MODULES", counting_guest.modules)


@pytest.fixture(scope="session")
def foreign_reader(require):
    """libguestfs has all that it needs here."""
    require(libguestfs_program.is_installed(), "libguestfs is missing: make setup installs it")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in kernel.environment().items():
            environment.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def capability_cache(request):
    """A folder with what libvirt learnt about this host's QEMUs (8 s to learn); kept from one run to the next.

    libvirt checks each entry against the binary and the host, and learns anew by itself.
    """
    return request.config.cache.mkdir("libvirt-capabilities")


@pytest.fixture(scope="session")
def new_embed_root(capability_cache):
    """Makes fresh roots for the embedded driver, for other processes; their guests and files go at the end."""
    with private_libvirt.roots(capability_cache) as make:
        yield make


@pytest.fixture(scope="session")
def embed_root(new_embed_root):
    """The root that this test process holds: libvirt allows one per process, until the process ends."""
    return new_embed_root()


@pytest.fixture
def connection(embed_root):
    """A connection to the embedded driver without any domain; those of the test are gone afterwards."""
    with hypervisor.opened(f"qemu:///embed?root={embed_root}", wait_s=60) as connection:
        yield connection
        remove_domains(connection)


@pytest.fixture
def libvirtd(new_embed_root):
    """A libvirtd that only this test uses, on fresh folders; its guests are gone afterwards."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    with private_libvirt.daemon(new_embed_root()) as daemon:
        yield daemon


@pytest.fixture
def user(require, require_program, capability_cache):
    """An ordinary user with a session libvirt of his own (not started yet)."""
    require_program("setpriv")
    require_program("libvirtd")
    python = ordinary_user.find_python()
    require(python is not None, "no Python of this version that every user may run: install python3")
    with ordinary_user.made(python, capability_cache) as one:
        yield one


def remove_domains(connection):
    """Ends and undefines every domain of a connection."""
    for domain in connection.domains():
        domain.destroy()
        if connection.find_domain(domain.uuid) is not None:
            domain.undefine(keep_nvram=False, keep_tpm=False)
