"""The configuration file, seen from the command line: what it changes, and how a wrong one is told."""

from __future__ import annotations

import pytest

CARD = "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='lan'/></interface>"
DOMAIN = "<domain type='qemu'><name>plain</name><uuid>11111111-2222-4333-8444-555555555555</uuid><memory>65536</memory><os><type>hvm</type></os><devices>{}</devices></domain>"


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """``configured(text)``: the one configuration file."""
    monkeypatch.setenv("HVMGR_CONFIG", str(tmp_path / "etc"))

    def write(text):
        file = tmp_path / "etc" / "hvmgr.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return write


@pytest.fixture
def exported(root, tmp_path):
    """A domain's XML with a card in a bridge that is not here."""
    file = tmp_path / "plain.xml"
    file.write_text(DOMAIN.format(CARD))
    return file


MAPPED = "maps:\n- networks:\n  - {old: lan, new: disconnected}\n  paths:\n  - {old: /no/such, new: /other}\n"


def test_show_says_where_each_value_comes_from(hvmgr, configured, root):
    file = configured("root: /elsewhere\nhook-time-limit: 2m\n" + MAPPED)
    told = hvmgr.ok("config", "show", "--json").json
    assert told["config"]["root"] == {"value": str(root), "source": "HVMGR_ROOT"}
    assert told["config"]["hook-time-limit"] == {"value": "120", "source": f"{file}, line 2"}
    assert told["config"]["compress"] == {"value": "none", "source": "default"}
    assert told["maps"][0] == {"map": "networks", "old": "lan", "new": "disconnected", "source": f"{file}, line 5"}
    rows = hvmgr.ok("config", "show").lines
    assert ["maps: paths", "/no/such = /other", f"{file}, line 7"] in rows


def test_wrong_file_is_told_with_its_line_and_help_works(hvmgr, configured, monkeypatch):
    monkeypatch.delenv("HVMGR_ROOT", raising=False)
    file = configured("# c\nroots: /srv\n")
    answer = hvmgr("vm", "list")
    assert (answer.code, answer.out) == (2, "")
    assert f"{file}, line 2: unknown key 'roots'" in answer.err
    assert "did you mean 'root'?" in answer.err
    assert hvmgr("config", "show").code == 2
    assert hvmgr.ok("--help").out


def test_maps_of_the_file_are_followed_and_said(hvmgr, configured, exported):
    assert hvmgr("import", exported).code == 4  # no such bridge
    file = configured(MAPPED)
    found = {one["code"]: one for one in hvmgr.ok("compare", exported, "--json").json["findings"]}
    sentence = f"network lan is disconnected here: {file}, line 3"
    assert "missing-bridge" not in found
    assert found["default-map"]["sentence"] == sentence
    planned = hvmgr("import", exported, "--dry-run")
    assert (planned.code, planned.err) == (0, f"default-map: {sentence}\n")
    assert hvmgr("import", exported).code == 0
    assert "'lan'" not in (exported.parent / "plain.xml").read_text().replace(CARD, "")


def test_maps_of_the_file_stand_in_a_written_plan(hvmgr, configured, exported, tmp_path):
    configured(MAPPED)
    hvmgr.ok("compare", exported, "--plan-out", tmp_path / "plan.yaml")
    assert "default-map: network lan is disconnected here" in (tmp_path / "plan.yaml").read_text()
    assert hvmgr("import", "--plan", tmp_path / "plan.yaml").code == 0


def test_command_line_comes_before_the_file(hvmgr, configured, exported):
    configured(MAPPED)
    answer = hvmgr("import", exported, "--network", "lan=bridge=nowhere")
    assert answer.code == 4
    assert "nowhere" in answer.err
    assert "default-map" not in answer.err


def test_root_of_the_file_is_where_vms_go(hvmgr, configured, root, monkeypatch):
    monkeypatch.delenv("HVMGR_ROOT")
    configured(f"root: {root}/more\n")
    hvmgr.ok("vm", "create", "web", "--network", "none")
    assert (root / "more" / "web").is_dir()


def test_saved_memory_is_compressed_as_the_file_or_the_option_says(hvmgr, vm, configured):
    hvmgr.ok("vm", "start", vm)
    try:
        for text, option, is_compressed in (
            ("", (), False),
            ("compress: zstd\n", (), True),
            ("compress: zstd\n", ("--compress", "none"), False),
            ("compress: none\n", ("--compress", "zstd"), True),
        ):
            configured(text)
            plan = hvmgr("snapshot", "create", vm, "--dry-run", "--json", *option).json["plan"]
            steps = {one["step"] for one in plan["prepare"] + plan["finish"]}
            assert ("CompressMemory" in steps) == is_compressed
    finally:
        hvmgr.ok("vm", "stop", vm, "--force")
