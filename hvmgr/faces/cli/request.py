"""What one command line asks for besides its command: the global options, and what follows from them.

A command opens the host with ``host``, puts what it changes into ``changing`` and ends with ``done``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr import errors, settings
from hvmgr.faces.cli import json_out, render

if TYPE_CHECKING:
    from hvmgr.faces.cli.progress import Bars
    from hvmgr.model.plan import Plan
    from hvmgr.operations.host import Host
    from hvmgr.operations.vm import VM


_SAID = 200  # characters of what goes, in the one sentence that is said where nobody can be asked


@dataclass(slots=True)
class Request:
    """The global options of one command line; filled while it is parsed."""

    uri: str | None = None
    root: Path | None = None
    json: bool = False
    dry_run: bool = False
    yes: bool = False
    wait_s: float = settings.LOCK_WAIT_S
    verbose: bool = False
    declined: Plan | None = field(default=None, repr=False)
    listener: Callable[[Any], None] | None = field(default=None, repr=False)  # of how far long work is, bars aside
    _bars: Bars | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def host(self) -> Iterator[Host]:
        """The host that the options name; it is connected when something needs libvirt."""
        from hvmgr.operations.host import Host
        from hvmgr.operations.reporter import Reporter

        root = self.root or settings.default_root()
        if root.exists() and not root.is_dir():
            raise errors.UsageError(f"{root} is no folder", hint="name the folder that holds the VM homes with --root")
        reporter = Reporter(notice=render.notice, progress=self.report, approve=self._approve, dry_run=self.dry_run)
        with Host.open(self.uri, root=root, wait_s=self.wait_s, reporter=reporter) as host, self._drawing():
            yield host

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Whatever is changed is changed in here; with ``--dry-run`` the plan is shown in its place."""
        try:
            yield
        except errors.Declined:
            if self.declined is None:
                raise
            self.show_plan(self.declined)

    def done(self, sentence: str, facts: Mapping[str, Any], *, changed: bool = True) -> None:
        """Say what was made; a dry run that comes here had nothing to do."""
        if self.dry_run:
            self.show_plan(None)
        elif self.json:
            json_out.show({"changed": changed, **facts})
        else:
            render.say(sentence)

    @contextlib.contextmanager
    def seconded(self, vm: VM) -> Iterator[None]:
        """Should this command be killed in here, another one does at once what the next command on the VM would do.

        A guest may stand still meanwhile, and QEMU may be in a state that only hvmgr ends.
        """
        from hvmgr.host import process

        if self.dry_run:
            yield
            return
        host = vm.host
        argv = [sys.executable, "-P", "-m", "hvmgr", "-c", host.uri, "--root", str(host.root), "vm", "show", vm.id]
        with process.seconded(argv):
            yield

    def show_plan(self, plan: Plan | None, *, first: Plan | None = None) -> None:
        """What would be done: sentences, or with ``--json`` the plan itself (null: nothing).

        ``first`` is what comes before it in a command that does two things.
        """
        from hvmgr.operations import user_hooks

        hooks = [found for one in (first, plan) if one is not None for found in user_hooks.foreseen(one)]
        if self.json:
            documents = {"first": first, "plan": plan} if first is not None else {"plan": plan}
            shown = {key: None if one is None else one.to_json() for key, one in documents.items()}
            json_out.show({**shown, "hooks": [{"event": which.value, "path": str(path)} for which, path in hooks]})
            return
        for one in (first, plan):
            if one is not None:
                render.say(f"{one.subject}:" if one.steps() else one.subject)
                for number, step in enumerate(one.steps(), 1):
                    render.say(f"{number:>3}. {step.describe()}")
        for which, path in hooks:
            render.say(f"hook for {which}: {path}")
        if plan is None:
            render.say("nothing to do")

    def planned(self, act: Callable[[], object]) -> Plan | None:
        """The plan of an act, in a dry run."""
        self.declined = None
        with contextlib.suppress(errors.Declined):
            act()
        return self.declined

    # -- asking --------------------------------------------------------------------------------------------------

    def require_consent(self, what: str, lines: Sequence[str] = (), *, always: bool = False) -> None:
        """Guest data goes for good: a person is asked first. Without one, ``always`` demands ``--yes``."""
        if self.yes or self.dry_run:
            return
        if not _is_person_there():
            if always:
                told = f"{what}: {', '.join(lines)}" if lines and sum(map(len, lines)) <= _SAID else what
                raise errors.UsageError(f"{told}; nobody is there to ask", hint="give --yes if that is meant")
            return
        for line in (f"{what}:" if lines else what, *(f"  {line}" for line in lines)):
            render.notice(line)
        sys.stderr.write("Go on? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            raise errors.Declined("not done; nothing was changed")

    def announce(self, what: str, lines: Sequence[str]) -> None:
        """Something is given up that is no guest data: said in every case, and asked where a person is."""
        if not self.yes and not self.dry_run and _is_person_there():
            self.require_consent(what, lines)
            return
        for line in (f"{what}:", *(f"  {line}" for line in lines)):
            render.notice(line)

    # -- libvirt -------------------------------------------------------------------------------------------------

    def state(self, vm: VM) -> str | None:
        """What a VM does; None where its libvirt cannot be asked."""
        if vm.home.facts().uri != vm.host.uri:
            return None
        try:
            return vm.state().value
        except errors.HvmgrError:
            return None

    # -- what an operation tells ---------------------------------------------------------------------------------

    def report(self, progress: Any) -> None:
        """How far a piece of work is, drawn where somebody looks."""
        if self.listener is not None:
            self.listener(progress)
        if self._bars is None and sys.stderr.isatty():
            from hvmgr.faces.cli.progress import Bars

            self._bars = Bars()
        if self._bars is not None:
            self._bars.update(progress)

    def _approve(self, plan: Plan) -> bool:
        if self.dry_run:
            self.declined = plan
        return not self.dry_run

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._bars is not None:
                self._bars.close()
                self._bars = None


def _is_person_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
