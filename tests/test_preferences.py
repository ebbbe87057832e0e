"""The configuration files: which one counts, what each line may say, and what one without them costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvmgr import errors, settings
from hvmgr.keeping import Keep

NAME = os.uname().nodename


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """``folders(system, user)`` writes the two files; nothing of this machine is read."""
    for name in ("HVMGR_CONFIG", "HVMGR_ROOT", "LIBVIRT_DEFAULT_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings, "SYSTEM_CONFIG", tmp_path / "etc")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    places = (tmp_path / "etc" / "hvmgr.yaml", tmp_path / "home" / "hvmgr" / "hvmgr.yaml")

    def write(*texts):
        for place, text in zip(places, texts, strict=False):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return places

    return write


def test_environment_comes_before_the_user_and_he_before_the_system(folders, monkeypatch):
    system, user = folders("root: /srv/all\ncompress: zstd\n", "# mine\n\nroot: /srv/mine\n")
    assert settings.default_root() == Path("/srv/mine")
    assert settings.origin("root", "HVMGR_ROOT") == f"{user}, line 3"
    assert settings.compression() == "zstd"
    assert settings.origin("compress") == f"{system}, line 2"
    monkeypatch.setenv("HVMGR_ROOT", "/srv/env")
    assert settings.default_root() == Path("/srv/env")
    assert settings.origin("root", "HVMGR_ROOT") == "HVMGR_ROOT"
    assert settings.hook_time_limit_s() == settings.HOOK_LIMIT_S
    assert settings.origin("hook-time-limit") == "default"


def test_file_of_another_user_is_not_the_users_own(folders):
    """As with a sudo that leaves HOME as it was."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    _, user = folders("root: /srv/all\n", "root: /srv/theirs\n")
    os.chown(user.parent, 65534, 65534)
    assert settings.default_root() == Path("/srv/all")
    os.chown(user.parent, 0, 0)
    os.chown(user, 65534, 65534)
    with pytest.raises(errors.UsageError, match="written by others"):
        settings.default_root()


def test_file_is_read_again_when_it_has_changed(folders):
    folders("root: /srv/one\n")
    assert settings.default_root() == Path("/srv/one")
    folders("root: /srv/other\n")
    assert settings.default_root() == Path("/srv/other")


def test_values_are_read_as_they_are_meant(folders):
    folders("connection: qemu:///session\nroot: ~/vms\nhook-time-limit: 1.5m\nspace-low: 20G\n")
    assert settings.default_uri() == "qemu:///session"
    assert settings.default_root() == Path.home() / "vms"
    assert settings.hook_time_limit_s() == 90
    assert settings.space_low(1 << 40) == 20 << 30
    folders("space-low: 2.5%\nretention: last=2,daily=9\n")
    assert settings.space_low(1000) == 25
    assert settings.retention() == Keep(last=2, daily=9)
    folders("retention: 5\n")
    assert settings.retention() == Keep(last=5)


MAPS = """maps:
  - hosts: [nobody, "{pattern}"]
    networks: [{{old: lan, new: here}}]
  - networks:
      - {{old: lan, new: everywhere}}
      - {{old: dmz, new: br0}}
    paths: [{{old: /srv/gold/, new: /data//gold}}]
"""


def test_maps_are_those_of_this_host(folders):
    system, user = folders(MAPS.format(pattern=NAME[:1] + "*"), "maps:\n- networks: [{old: dmz, new: mine}]\n")
    assert settings.import_maps("networks") == [
        ("dmz", "mine", f"{user}, line 2"),
        ("lan", "here", f"{system}, line 3"),
    ]
    assert settings.import_maps("paths") == [("/srv/gold", "/data/gold", f"{system}, line 7")]
    folders(MAPS.format(pattern="another"), "")
    assert settings.import_maps("networks")[0] == ("lan", "everywhere", f"{system}, line 5")


@pytest.mark.parametrize(
    ("text", "line", "what", "hint"),
    [
        ("rot: /srv", 1, "unknown key 'rot'", "did you mean 'root'?"),
        ("# c\nroot: srv", 2, "'srv' is not an absolute path", None),
        ("root: /a\nroot: /b", 2, "'root' is there twice", None),
        ("root: [", 1, "", None),
        ("root: &a /srv", 1, "anchors", None),
        ("- root", 1, "lines of the form", None),
        ("connection: xen:///", 1, "no connection to QEMU", None),
        ("compress: lzma", 1, "'lzma' is unknown", None),
        ("hook-time-limit: soon", 1, "not a length of time", None),
        ("hook-time-limit: 0", 1, "between 0 and a day", None),
        ("retention: 0", 1, "keeps 0 snapshots", "each one makes"),
        ("retention: daily", 1, "does not say how many snapshots are kept", "write a number"),
        ("space-low: 120%", 1, "no part of a file system", None),
        ("space-low: -1", 1, "is not a size", None),
        ("maps: lan", 1, "a list is expected", None),
        ("maps:\n- network: []", 2, "unknown key 'network'", "did you mean 'networks'?"),
        ("maps:\n- networks:\n  - {old: a}", 3, "'new' is missing", None),
        ("maps:\n- paths:\n  - {old: a, new: /b}", 3, "not an absolute path", None),
        ("maps:\n- paths:\n  - {old: /a, new: /b}\n  - {old: /a/, new: /c}", 4, "'/a' is there twice", None),
        ("maps:\n- hosts: []", 2, "no host is named", None),
    ],
)
def test_error_names_file_and_line(text, line, what, hint, folders):
    system, _ = folders(text)
    with pytest.raises(errors.UsageError, match=f"{system}, line {line}\\b") as caught:
        settings.find("root")
    assert what in caught.value.message
    assert hint is None or caught.value.hint.startswith(hint)


@pytest.mark.parametrize("text", ["", "\n# nothing yet\n", "---\n", "root: ~\n"])
def test_file_that_says_nothing(text, folders):
    folders(text)
    if text == "---\n":
        with pytest.raises(errors.UsageError):
            settings.find("root")
    else:
        assert settings.find("root") is None


def test_file_that_others_may_write_is_refused(folders):
    system, _ = folders("root: /srv\n")
    system.chmod(0o666)
    with pytest.raises(errors.UsageError, match="written by others"):
        settings.default_root()


@pytest.mark.parametrize("content", [b"root: \xff\n", b"#" * (1 << 20) + b"#"])
def test_file_that_is_no_text_or_too_large(content, folders):
    system, _ = folders("")
    system.write_bytes(content)
    with pytest.raises(errors.UsageError, match=r"not UTF-8|larger than"):
        settings.find("root")


def test_folder_in_the_place_of_the_file(folders, tmp_path):
    (tmp_path / "etc" / settings.CONFIG_FILE).mkdir(parents=True)
    with pytest.raises(errors.UsageError, match="is no file"):
        settings.find("root")


@pytest.mark.parametrize("is_there", [False, True])
def test_yaml_is_loaded_only_for_a_file(is_there, folders, tmp_path):
    if is_there:
        folders("root: /srv\n")
    program = "import sys; from hvmgr import settings; settings.default_root(); print('yaml' in sys.modules)"
    environment = {**os.environ, "HVMGR_CONFIG": str(tmp_path / "etc")}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root, env=environment
    )
    assert done.stdout == f"{is_there}\n"
