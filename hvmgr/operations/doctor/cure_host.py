"""What a repair changes on the host itself, after it was asked for: QEMU may have userfaultfd, now and after each boot.

It is the host's security setting: any process may then stall the kernel's work on its own memory, which has helped some
exploits. So a person or ``--yes`` has to want it; without both it stays a finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hvmgr.host import confinement, userfault
from hvmgr.model.diagnosis import Code
from hvmgr.model.finding import Finding
from hvmgr.operations.doctor import host_checks
from hvmgr.operations.doctor.cure import Cure
from hvmgr.storage import durable

if TYPE_CHECKING:
    from collections.abc import Callable


def userfaultfd(found: tuple[Finding, ...], allow: Callable[[str], bool]) -> Iterator[Cure]:
    """The kernel's setting and the file that keeps it, when ``allow`` says yes to the sentence."""
    for one in found:
        is_it = one.code == Code.ABILITY_MISSING and one.where == host_checks.BACKGROUND
        if is_it and confinement.has_userfaultfd():
            sentence = (
                f"set {userfault.SYSCTL} to 1 (every process may use userfaultfd) and keep it in {userfault.DROP_IN}"
            )
            if allow(sentence):
                yield Cure(one, sentence, _enable)


def _enable() -> None:
    """The file first: a setting that the next boot takes back would surprise."""
    drop_in = confinement.ROOT / userfault.DROP_IN.relative_to("/")
    durable.make_folder(drop_in.parent, mode=0o755)
    durable.write_file(drop_in, userfault.DROP_IN_TEXT.encode(), mode=0o644)
    setting = confinement.ROOT / userfault.SYSCTL_FILE.relative_to("/")
    with durable.explained(setting):
        setting.write_text("1\n")
