"""The hooks: what a start costs with and without libvirt's, what it costs everybody else, and what one of a user's costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench import harness, snapshots
from bench.harness import Result
from bench.snapshots import Bench, Scale
from hvmgr import VM
from hvmgr.operations import start_hook

LENGTH = 30  # images in the chain of the VM that is started: as many as pass without a warning


def measure(say: Callable[[str], None], scale: Scale | None = None, *, length: int = LENGTH) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with snapshots.prepared(install_hook) as bench:
        vm = bench.new_vm("hooked")
        _without_screen(bench, vm)
        for _ in range(length - 1):
            vm.create_snapshot()
        results: list[Result] = []
        for part in (_start, _restore, _script, _user_hooks):
            say(f"hook: {part.__name__.strip('_')}")
            results += part(bench, vm, scale)
    return results


def install_hook(root: Path) -> None:
    """A libvirtd on this root finds the hook when it starts."""
    start_hook.install(root / "etc" / "hooks")


def _without_screen(bench: Bench, vm: VM) -> None:
    """Nobody looks, and libvirts that know nothing of each other would quarrel about VNC ports."""
    present = vm.home.present()
    devices = present.root.find("devices")
    assert devices is not None
    for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("audio")]:
        devices.remove(device)
    bench.host.connection.define(present.to_xml())
    vm.stop()


def _start(bench: Bench, vm: VM, scale: Scale) -> list[Result]:
    """A libvirtd that found hooks when it started looks for scripts at each start, and so they can come and go."""
    hooks = bench.folder / "etc" / "hooks"
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(scale.warm_up + scale.rounds):
        for hooked in (True, False):
            (start_hook.install if hooked else start_hook.uninstall)(hooks)
            start = time.perf_counter()
            bench.virsh("start", vm.name)
            if number >= scale.warm_up:
                seconds[hooked].append(time.perf_counter() - start)
            bench.virsh("destroy", vm.name)
    start_hook.install(hooks)
    ours, theirs = statistics.median(seconds[True]), statistics.median(seconds[False])
    return [Result(f"virsh start, {len(vm.snapshots()) + 1} images", ours, theirs, "without the hook", aim=1.5)]


def _restore(bench: Bench, vm: VM, scale: Scale) -> list[Result]:
    """A saved VM goes on: the hook is run twice, for its configuration and for the start."""
    hooks = bench.folder / "etc" / "hooks"
    seconds: dict[bool, list[float]] = {True: [], False: []}
    bench.virsh("start", vm.name)
    for number in range(scale.warm_up + scale.rounds):
        for hooked in (True, False):
            bench.virsh("managedsave", vm.name)
            (start_hook.install if hooked else start_hook.uninstall)(hooks)
            start = time.perf_counter()
            bench.virsh("start", vm.name)
            if number >= scale.warm_up:
                seconds[hooked].append(time.perf_counter() - start)
    bench.virsh("destroy", vm.name)
    start_hook.install(hooks)
    ours, theirs = statistics.median(seconds[True]), statistics.median(seconds[False])
    return [Result("virsh start of a saved VM", ours, theirs, "without the hook", aim=1.5)]


def _user_hooks(bench: Bench, vm: VM, scale: Scale) -> list[Result]:
    """A snapshot with a hook before it and one after it, each a shell that ends at once; and a shell alone."""
    config = bench.folder / "config"
    made = [config / "hooks.d" / event / "hook" for event in ("before-snapshot", "snapshot-created")]
    for hook in made:
        hook.parent.mkdir(parents=True)
        hook.write_text("#!/bin/sh\nexit 0\n")

    def create(mode: int) -> Callable[[], None]:
        def once() -> None:
            for hook in made:
                hook.chmod(mode)
            vm.create_snapshot().delete()

        return once

    before = os.environ.get("HVMGR_CONFIG")
    os.environ["HVMGR_CONFIG"] = str(config)
    try:
        found = harness.in_turns(
            {"with": create(0o755), "without": create(0o644)}, rounds=scale.rounds, warm_up=scale.warm_up
        )
    finally:
        if before is None:
            del os.environ["HVMGR_CONFIG"]
        else:
            os.environ["HVMGR_CONFIG"] = before
    return [
        Result("snapshot create and delete, two hooks", found["with"], found["without"], "without hooks", aim=1.5),
    ]


def _script(bench: Bench, vm: VM, scale: Scale) -> list[Result]:
    """The script alone, as libvirt runs it."""
    path = start_hook.path_in(bench.folder / "etc" / "hooks")
    ours = bench.host.connection.find_domain(vm.id)
    assert ours is not None
    text = ours.xml(live=False).encode()
    foreign = text.replace(b"urn:hvmgr:vm:1", b"urn:other:vm:1")

    def run(operation: str, xml: bytes) -> Callable[[], None]:
        def once() -> None:
            argv = [path, "web", operation, "begin", "-"]
            done = subprocess.run(argv, input=xml, capture_output=True, check=False, env={"PATH": "/usr/bin:/bin"})
            if done.returncode != 0:
                raise SystemExit(f"bench: the hook refused: {done.stderr.decode(errors='replace')}")

        return once

    found = harness.in_turns(
        {
            "other phase": run("started", text),
            "foreign": run("prepare", foreign),
            "ours": run("prepare", text),
            "restore": run("restore", text),
        },
        rounds=3 * scale.rounds,
        warm_up=scale.warm_up,
    )
    return [
        Result("hook, any other phase", found["other phase"], limit=0.05),
        Result("hook, a VM that is not hvmgr's", found["foreign"], limit=0.05),
        Result("hook, a VM of hvmgr's", found["ours"]),
        Result("hook, a saved VM of hvmgr's", found["restore"]),
    ]
