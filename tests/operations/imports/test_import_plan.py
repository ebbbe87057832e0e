"""Plans: prepared, changed, checked and run by a program; written as YAML, edited and read back."""

from __future__ import annotations

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.operations.exchange import import_document


@pytest.fixture
def source(bench, branched):
    source = bench.take_away(branched)
    path = next((source / "Virtual Machines").glob("*.xml"))
    path.chmod(0o600)
    card = "<interface type='network'><mac address='52:54:00:aa:bb:01'/><source network='lan'/></interface>"
    path.write_text(path.read_text().replace("</devices>", f"{card}</devices>"))
    return source


def errors_of(plan):
    return [one.code for one in plan.check() if one.severity is hvmgr.Severity.ERROR]


def test_program_mends_what_is_in_the_way(bench, source):
    plan = bench.host.plan_import(source)
    assert errors_of(plan) == ["missing-network"]
    assert [(one.mac, one.plugged) for one in plan.nics] == [("52:54:00:aa:bb:01", "network=lan")]
    plan.nics[0].network = "bridge=lo"
    plan.name = "other"
    plan.snapshots[0].keep = False
    assert errors_of(plan) == []
    vm = plan.run()
    assert vm.name == "other"
    assert vm.home.present().nics()[0].source == "lo"
    assert {one.name for one in vm.snapshots()} == {"two", "three", "left"}


def test_round_trip(bench, source):
    options = hvmgr.ImportOptions(
        name='odd "name" ünï', new_id=False, paths={"/a=b": "/c"}, networks={"lan": "bridge=lo"}, owner="anna",
        tags=("one", "two"), vm_path=bench.place / "a", drop_snapshots=("two",), without_state=True,
        disk_targets={"hda": "/x/y"}, vlans={"52:54:00:aa:bb:01": "7"},
    )  # fmt: skip
    plan = bench.host.plan_import(source, options)
    text = import_document.to_yaml(plan, [])
    assert import_document.from_yaml(bench.host, text, source="plan") == plan


def test_findings_stand_beside_what_they_are_about(bench, source):
    plan = bench.host.plan_import(source)
    text = import_document.to_yaml(plan, plan.check())
    card = text[text.index("nics:") :]
    assert "# error missing-network" in card
    assert card.index("missing-network") < card.index("52:54")
    assert "--network lan=OTHER" in card


def test_edited_plan_is_checked_again_and_run(bench, source):
    plan = bench.host.plan_import(source)
    text = import_document.to_yaml(plan, plan.check())
    with pytest.raises(errors.Conflict):
        import_document.from_yaml(bench.host, text, source="plan").run()
    edited = text.replace("    network: ~", "    network: disconnected").replace('name: "web"', 'name: "edited"', 1)
    assert import_document.from_yaml(bench.host, edited, source="plan").run().name == "edited"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("mode: copy", "mode: cpoy", "'cpoy' is unknown"),
        ("nics:", "nisc:", "unknown key 'nisc'"),
        ("identity: new", "identity: old", "neither new nor keep"),
        ('  - slot: "hda"', '  - slot: "vdz"', "no disk 'vdz'"),
        ("52:54:00:aa:bb:01", "52:54:00:aa:bb:99", "no card"),
        ('plugged: "network=lan"', 'plugged: "network=dmz"', "write the new one to 'network'"),
        ("replace: no", "replace: maybe", "neither yes nor no"),
        ("vm-path: ~", "vm-path: relative", "not an absolute path"),
        ("format: 1", "format: 2", "format 1"),
        ("keep: yes", "keep: [", "expected"),
    ],
)
def test_typing_error_names_its_line(bench, source, old, new, words):
    text = import_document.to_yaml(bench.host.plan_import(source), [])
    assert old in text
    edited = text.replace(old, new, 1)
    line = edited[: edited.index(new)].count("\n") + 1
    with pytest.raises(errors.UsageError) as caught:
        import_document.from_yaml(bench.host, edited, source="plan.yaml")
    told = f"{caught.value.message} {caught.value.hint}"
    assert words in told
    assert f"plan.yaml, line {line}" in told or "expected" in words


def test_names_of_a_hostile_source_stay_comments(bench, source):
    path = next((source / "Virtual Machines").glob("*.xml"))
    path.write_text(path.read_text().replace("network='lan'", "network='lan&#10;mode: link'"))
    plan = bench.host.plan_import(source)
    again = import_document.from_yaml(bench.host, import_document.to_yaml(plan, plan.check()), source="plan")
    assert again.mode is hvmgr.Mode.COPY
