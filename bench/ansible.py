"""Ansible: what a module costs beside a bare command, and a gold image on more and more hosts."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import harness, snapshots
from bench.harness import Result
from bench.snapshots import Bench
from tests import collection


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 5
    warm_up: int = 1
    hosts: tuple[int, ...] = (2, 4, 8)


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with snapshots.prepared() as bench, tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        runner = _Runner(bench, home, collection.install(collection.build(home, home), home, home))
        gold = bench.new_vm("gold")
        gold.create_snapshot("released")
        export = gold.export(bench.folder / "gold")
        say("ansible: one module")
        results = [_module(runner, scale)]
        say(f"ansible: {', '.join(map(str, scale.hosts))} hosts")
        return [*results, *_rollout(runner, export, scale)]


@dataclass(frozen=True, slots=True)
class _Runner:
    """Ansible with the collection, on hosts that are this machine."""

    bench: Bench
    home: Path
    collections: Path

    def run(self, program: str, *words: str | Path) -> None:
        """One command of Ansible's to its end."""
        more = {"ANSIBLE_COLLECTIONS_PATH": str(self.collections), "ANSIBLE_PIPELINING": "1", "ANSIBLE_FORKS": "2"}
        done = collection.run(
            [collection.program(program), "-e", f"ansible_python_interpreter={sys.executable}", *words],
            cwd=self.home,
            home=self.home,
            **more,
        )
        if done.returncode != 0:
            raise SystemExit(f"bench: {program} {words} ended with {done.returncode}\n{done.stdout}{done.stderr}")

    @property
    def place(self) -> dict[str, str]:
        """Where the modules find hvmgr and its VMs."""
        return {
            "executable": collection.program("hvmgr"),
            "uri": self.bench.host.uri,
            "root": str(self.bench.host.root),
        }


def _module(runner: _Runner, scale: Scale) -> Result:
    where = runner.place
    bare = f"{where['executable']} --json -c {where['uri']} --root {where['root']} snapshot list gold"
    local = ("localhost", "-c", "local", "-m")
    found = harness.in_turns(
        {
            "module": lambda: runner.run(
                "ansible", *local, "hvmgr.hvmgr.snapshot_info", "-a", json.dumps({**where, "vm": "gold"})
            ),
            "command": lambda: runner.run("ansible", *local, "ansible.builtin.command", "-a", bare),
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    return Result("ansible snapshot_info", found["module"], found["command"], "command: hvmgr --json", aim=1.5)


def _rollout(runner: _Runner, export: Path, scale: Scale) -> Iterator[Result]:
    """Seconds a host; each round makes VMs of names of its own."""
    runs = iter(range(1000))

    def once(count: int) -> None:
        number = next(runs)
        names = ",".join(f"h{number}-{one}" for one in range(count)) + ","
        more = {"fleet": "all", "gold_export": str(export), "gold_name": f"web-{number}-{{{{ inventory_hostname }}}}"}
        variables = {f"hvmgr_{key}": value for key, value in runner.place.items()}
        words = ("-c", "local", "-i", names, "-e", json.dumps({**more, **variables}), "hvmgr.hvmgr.gold")
        runner.run("ansible-playbook", *words)

    def contender(count: int) -> Callable[[], None]:
        return lambda: once(count)

    contenders = {str(count): contender(count) for count in scale.hosts}
    found = harness.in_turns(contenders, rounds=max(1, scale.rounds // 2), warm_up=scale.warm_up)
    least = scale.hosts[0]
    for count in scale.hosts[1:]:
        each, first = found[str(count)] / count, found[str(least)] / least
        yield Result(f"ansible gold, {count} hosts, each", each, first, f"{least} hosts, each", aim=1.2)
