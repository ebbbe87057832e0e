"""libvirt's save files: synthetic ones, and a real one that libvirt restores after each rewriting."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.host.saved_state import Compression

STREAM = b"QEVM\0\0\0\3" + bytes(range(256)) * 64

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=200)
compressions = st.sampled_from([c for c in Compression if c is not Compression.SPARSE])


def save_file(path, xml="<domain/>", *, stream=STREAM, **options):
    start = saved_state.head(xml, **{"complete": True, "was_running": True, **options})
    path.write_bytes(start + stream)
    return path


def stream_of(path):
    return path.read_bytes()[saved_state.read(path).data_offset :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("saved")


@given(texts, st.none() | texts, st.booleans(), st.booleans(), st.sampled_from(Compression))
def test_what_is_written_is_read(folder, xml, cookie, complete, was_running, compression):
    path = folder / "read"
    save_file(path, xml, cookie=cookie, complete=complete, was_running=was_running, compression=compression)
    state = saved_state.read(path)
    assert (state.xml, state.cookie, state.complete) == (xml, cookie, complete)
    assert (state.was_running, state.compression) == (was_running, compression)
    assert state.data_offset % 4096 == 0
    assert stream_of(path) == STREAM


def test_layout_is_libvirts(tmp_path):
    raw = save_file(tmp_path / "s", "<xml/>", cookie="<cookie/>", compression=Compression.ZSTD, slack=0).read_bytes()
    assert raw[:16] == b"LibvirtQemudSave"
    numbers = [int.from_bytes(raw[at : at + 4], sys.byteorder) for at in range(16, 36, 4)]
    assert numbers == [2, 4096 - 92, 1, 5, len("<xml/>") + 1]
    assert raw[36:92] == bytes(56)
    assert raw[92:].startswith(b"<xml/>\0<cookie/>\0\0\0")
    assert raw[4096:] == STREAM


@given(texts, st.none() | texts, st.integers(0, 600), st.lists(texts, max_size=4))
def test_replaced_again_and_again(folder, xml, cookie, slack, others):
    path = save_file(folder / "replace", xml, cookie=cookie, slack=slack)
    size, offset = path.stat().st_size, saved_state.read(path).data_offset
    for other in others:
        saved_state.replace_xml(path, other)
        state = saved_state.read(path)
        assert (state.xml, state.cookie, state.complete, state.data_offset) == (other, cookie, True, offset)
    assert (stream_of(path), path.stat().st_size) == (STREAM, size)


def test_replaced_by_a_longer_one_that_just_fits(tmp_path):
    path = save_file(tmp_path / "s", "<a/>", slack=0)
    room = saved_state.read(path).data_offset - 92
    saved_state.replace_xml(path, "x" * (room - 1))
    assert saved_state.read(path).xml == "x" * (room - 1)
    with pytest.raises(errors.Conflict) as caught:
        saved_state.replace_xml(path, "x" * room)
    assert (caught.value.facts["room"], caught.value.facts["needed"]) == (room, room + 1)
    assert saved_state.read(path).xml == "x" * (room - 1)


def test_cookie_makes_room(tmp_path):
    path = save_file(tmp_path / "s", "<a/>", cookie="<cookie/>", slack=0)
    room = saved_state.read(path).data_offset - 92 - len("<cookie/>") - 1
    saved_state.replace_xml(path, "x" * (room - 1))
    state = saved_state.read(path)
    assert (state.xml, state.cookie, state.cookie_offset) == ("x" * (room - 1), "<cookie/>", room)
    saved_state.replace_xml(path, "<short/>")
    assert (saved_state.read(path).xml, saved_state.read(path).cookie) == ("<short/>", "<cookie/>")


def test_refused_xml_leaves_the_file_as_it_was(tmp_path):
    path = save_file(tmp_path / "s", "<a/>", cookie="<cookie/>", slack=0)
    before = path.read_bytes()
    with pytest.raises(errors.Conflict):
        saved_state.replace_xml(path, "x" * 8192)
    assert saved_state.read(path).xml == "<a/>"
    assert saved_state.read(path).cookie == "<cookie/>"
    assert path.read_bytes()[4096:] == before[4096:]


@pytest.mark.parametrize("cookie", [None, "<cookie/>"], ids=["bare", "cookie"])
def test_killed_at_any_write_and_run_again(tmp_path, monkeypatch, cookie):
    """Each write is cut in its middle, the process ends there, the same call heals it."""
    real, new = os.pwrite, "<new>" + "n" * 3000 + "</new>"
    for n in range(1, 10):
        path = save_file(tmp_path / "s", "<old/>", cookie=cookie, slack=0)
        left = [n]

        def cut(descriptor, data, offset, left=left):
            left[0] -= 1
            if left[0] == 0:
                real(descriptor, data[: len(data) // 2] if len(data) > 4 else b"", offset)
                raise KeyboardInterrupt
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", cut)
        try:
            saved_state.replace_xml(path, new)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "pwrite", real)
            assert stream_of_torn(path) == STREAM
            saved_state.replace_xml(path, new)
            assert (saved_state.read(path).xml, saved_state.read(path).cookie) == (new, cookie)
    assert n == (2 if cookie is None else 4)


def stream_of_torn(path):
    return path.read_bytes()[4096:]


@given(texts, st.none() | texts, texts, st.booleans(), st.booleans(), compressions)
def test_rewritten(folder, xml, cookie, other, complete, was_running, compression):
    options = {"cookie": cookie, "complete": complete, "was_running": was_running, "compression": compression}
    source, target = save_file(folder / "from", xml, **options), folder / "to"
    before = source.read_bytes()
    target.unlink(missing_ok=True)
    saved_state.rewritten(source, target, other * 50)
    state = saved_state.read(target)
    assert (state.xml, state.cookie, state.complete) == (other * 50, cookie, complete)
    assert (state.was_running, state.compression) == (was_running, compression)
    assert stream_of(target) == STREAM
    assert state.data_offset % 4096 == 0
    assert source.read_bytes() == before
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_rewritten_keeps_holes(tmp_path):
    source = save_file(tmp_path / "from", stream=b"")
    with source.open("r+b") as file:
        offset = file.seek(0, os.SEEK_END)
        file.write(STREAM)
        file.seek(offset + (64 << 20))
        file.write(b"end")
        file.truncate(offset + (128 << 20))
    saved_state.rewritten(source, tmp_path / "to", "<domain>" + " " * 100_000 + "</domain>")
    copied = stream_of(tmp_path / "to")
    assert len(copied) == 128 << 20
    assert copied == stream_of(source)
    assert (tmp_path / "to").stat().st_blocks * 512 < 1 << 20


def test_rewritten_never_over_another_file(tmp_path):
    source = save_file(tmp_path / "from")
    (tmp_path / "to").write_text("mine")
    with pytest.raises(errors.Conflict):
        saved_state.rewritten(source, tmp_path / "to", "<a/>")
    assert (tmp_path / "to").read_text() == "mine"


def test_rewritten_refuses_a_sparse_stream(tmp_path):
    source = save_file(tmp_path / "from", compression=Compression.SPARSE)
    with pytest.raises(errors.Unsupported):
        saved_state.rewritten(source, tmp_path / "to", "<a/>")
    assert not (tmp_path / "to").exists()


def test_half_made_copy_is_incomplete_and_does_not_stay(tmp_path, monkeypatch):
    source = save_file(tmp_path / "from")

    def interrupted(target, *_):
        assert not saved_state.read(tmp_path / "to").complete
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "sendfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved_state.rewritten(source, tmp_path / "to", "<a/>")
    assert not (tmp_path / "to").exists()


def test_full_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "hvmgr-test", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system")
    try:
        source = save_file(tmp_path / "from", stream=os.urandom(2 << 20))
        with pytest.raises(errors.NoSpace):
            saved_state.rewritten(source, folder / "to", "<a/>")
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_marked_complete(tmp_path):
    path = save_file(tmp_path / "s", complete=False)
    assert not saved_state.read(path).complete
    saved_state.mark_complete(path)
    assert saved_state.read(path).complete
    assert stream_of(path) == STREAM


def put(offset, data):
    def change(raw):
        return raw[:offset] + data + raw[offset + len(data) :]

    return change


def number(offset, value):
    return put(offset, value.to_bytes(4, sys.byteorder))


DAMAGES = {
    "empty": lambda raw: b"",
    "short header": lambda raw: raw[:91],
    "another magic": put(0, b"LibvirtQemudSomx"),
    "version 1": number(16, 1),
    "version 3": number(16, 3),
    "other byte order": put(16, (2).to_bytes(4, "big" if sys.byteorder == "little" else "little")),
    "length behind the end": number(20, 1 << 24),
    "absurd length": number(20, (1 << 32) - 1),
    "no configuration": number(20, 0),
    "cut in the configuration": lambda raw: raw[:200],
    "unknown stream": number(28, 7),
    "cookie behind the data": number(32, 1 << 20),
    "cookie at the very end": number(32, 4096 - 92),
    "cookie inside the configuration": number(32, 3),
    "empty configuration": put(92, b"\0"),
    "not UTF-8": put(93, b"\xff\xfe"),
    "configuration without an end": lambda raw: raw[:92] + b"x" * (4096 - 92) + raw[4096:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_refused(tmp_path, damage):
    path = save_file(tmp_path / "s", "<domain/>", slack=0)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(errors.Corrupt, match=str(path)):
        saved_state.read(path)


@given(st.binary(max_size=300))
def test_garbage_is_refused(folder, raw):
    path = folder / "garbage"
    path.write_bytes(raw)
    with pytest.raises(errors.Corrupt):
        saved_state.read(path)


def test_missing_file(tmp_path):
    for act in (saved_state.read, saved_state.mark_complete, lambda path: saved_state.replace_xml(path, "<a/>")):
        with pytest.raises(errors.NotFound):
            act(tmp_path / "none")


class TestRealFile:
    """A managed save, which libvirt restores by the XML in the file itself."""

    @pytest.fixture
    def saved(self, connection, make_xml):
        domain = connection.define(make_xml("saved").replace("<memory", "<title>first</title><memory", 1))
        domain.start()
        domain.managed_save()
        return domain, connection.managed_save_path("saved")

    def restored_title(self, domain):
        domain.start(paused=True)
        title = domain.xml(live=True).partition("<title>")[2].partition("</title>")[0]
        domain.destroy()
        return title

    def test_is_read(self, saved):
        _, path = saved
        state = saved_state.read(path)
        assert (state.complete, state.was_running, state.compression) == (True, True, Compression.RAW)
        assert "<title>first</title>" in state.xml
        assert state.cookie.startswith("<cookie")
        assert stream_of(path).startswith(b"QEVM")

    @pytest.mark.parametrize("title", ["a", "first", "a longer title"], ids=["shorter", "same", "longer"])
    def test_restores_with_a_replaced_configuration(self, saved, title):
        domain, path = saved
        before, stream = saved_state.read(path), stream_of(path)
        saved_state.replace_xml(path, before.xml.replace("first", title))
        assert saved_state.read(path).cookie == before.cookie
        assert stream_of(path) == stream
        assert f"<title>{title}</title>" in domain.managed_save_xml()
        assert self.restored_title(domain) == title

    def test_restores_as_a_larger_copy(self, saved, tmp_path):
        domain, path = saved
        before, stream = saved_state.read(path), stream_of(path)
        title = "x" * 200_000
        with pytest.raises(errors.Conflict):
            saved_state.replace_xml(path, before.xml.replace("first", title))
        saved_state.rewritten(path, tmp_path / "copy", before.xml.replace("first", title))
        shutil.copyfile(tmp_path / "copy", path)
        assert saved_state.read(path).cookie == before.cookie
        assert stream_of(path) == stream
        assert self.restored_title(domain) == title
