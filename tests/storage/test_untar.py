"""Archives as a stream: what ``tar`` writes is read back, and everything that no export holds is refused with its place."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.storage import archives, tar, untar


def reader(data):
    return untar.Reader(io.BytesIO(data).readinto, "x.tar")


def read(data):
    """Every file with its bytes, holes as zeros."""
    one, found = reader(data), {}
    for entry in one.entries():
        if not entry.is_folder:
            whole = bytearray(entry.size)
            for offset, piece in one.pieces():
                whole[offset : offset + len(piece)] = piece
            found[entry.name] = bytes(whole)
    return found


def packed(*members, fmt=tarfile.PAX_FORMAT):
    """An archive of (name, content or type, attributes)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as one:
        for name, content, *more in members:
            info = tarfile.TarInfo(name)
            for attribute in more:
                for key, value in attribute.items():
                    setattr(info, key, value)
            if isinstance(content, bytes) and info.type == tarfile.REGTYPE:
                info.size = len(content)
                one.addfile(info, io.BytesIO(content))
            else:
                one.addfile(info)
    return file.getvalue()


def written(tmp_path, *files):
    """What our own writer makes of files with holes."""
    parts = []
    writer = tar.Writer(lambda view: parts.append(bytes(view)))
    writer.folder("web", mode=0o550)
    for number, runs in enumerate(files):
        path = tmp_path / f"f{number}"
        with path.open("wb") as file:
            for offset, length in runs:
                file.seek(offset)
                file.write(os.urandom(length))
            file.truncate(max((offset + length for offset, length in runs), default=0) + 70_000)
        writer.file(f"web/{'long' * 30}/f{number}", path, mode=0o440)
    writer.end()
    return b"".join(parts)


def test_our_own_writer(tmp_path):
    data = written(tmp_path, [(0, 10), (1 << 20, 4096)], [], [(5 << 20, 1)])
    found = read(data)
    assert [found[f"web/{'long' * 30}/f{number}"] for number in range(3)] == [
        (tmp_path / f"f{number}").read_bytes() for number in range(3)
    ]
    assert all(entry.data < 100_000 for entry in reader(data).entries())


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_other_writers(fmt):
    members = [("web", b"", {"type": tarfile.DIRTYPE}), (f"web/{'n' * 70}/{'m' * 80}", b"a" * 1000), ("web/ä", b"")]
    assert read(packed(*members, fmt=fmt)) == {f"web/{'n' * 70}/{'m' * 80}": b"a" * 1000, "web/ä": b""}


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (("web/x", None, {"type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}), "a symbolic link"),
        (("web/x", None, {"type": tarfile.LNKTYPE, "linkname": "web/a"}), "a hard link"),
        (("web/x", None, {"type": tarfile.CHRTYPE, "devmajor": 1}), "a device"),
        (("web/x", None, {"type": tarfile.BLKTYPE}), "a device"),
        (("web/x", None, {"type": tarfile.FIFOTYPE}), "a pipe"),
        (("/etc/passwd", b"x"), "leads out"),
        (("web/../../x", b"x"), "leads out"),
        (("..", b"x"), "leads out"),
        (("web//x", b"x"), "leads out"),
        (("web/a", b"x"), "twice"),
        (("./web/a", b"x"), "twice"),
        (("web/a/b", b"x"), "lies in a file"),
        (("web", b"x"), "twice"),
        (("web/" + "x" * 300, b"x"), "too long"),
        (("web/x", b"", {"type": tarfile.DIRTYPE, "pax_headers": {"size": "5"}}), "has a size"),
        (("web/x", b"abc", {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}}), "no number of bytes"),
        (
            (
                "web/x",
                b"1\n0\n3\n" + bytes(506) + b"abcd",
                {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3"}},
            ),
            "leave another number",
        ),
        (
            (
                "web/x",
                b"2\n0\n3\n1\n3\n" + bytes(501) + b"abcdef",
                {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}},
            ),
            "contradict each other",
        ),
        (
            (
                "web/x",
                b"1\n0\n9\n" + bytes(506) + b"abcdefghi",
                {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3"}},
            ),
            "contradict each other",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0][:20],
)
def test_what_no_export_holds(member, words):
    with pytest.raises(errors.Corrupt, match=words) as caught:
        read(packed(("web/a", b"a"), member))
    assert "at byte" in str(caught.value)


def test_old_notation_of_holes():
    with pytest.raises(errors.Unsupported, match="old notation"):
        read(packed(("web/x", b"abc", {"pax_headers": {"GNU.sparse.map": "0,3"}})))


def test_every_cut_is_seen(tmp_path):
    data = written(tmp_path, [(0, 3000)])
    for length in range(0, len(data), 97):
        with pytest.raises(errors.Corrupt, match="ends in the middle"):
            read(data[:length])


def test_bytes_behind_the_end(tmp_path):
    data = written(tmp_path, [(0, 30)])
    assert read(data + bytes(20_000)) == read(data)
    with pytest.raises(errors.Corrupt, match="behind the end"):
        read(data + bytes(700) + b"x")


@given(st.data())
@settings(max_examples=60)
def test_any_damage_is_an_error_of_ours_or_harmless(data):
    whole = bytearray(packed(("web/a", b"a" * 600), ("web/b", b"b", {"pax_headers": {"path": "web/ü"}})))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(errors.Corrupt, errors.Unsupported):
        read(bytes(whole))


def test_pipe_is_no_archive_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert not archives.is_archive(tmp_path / "pipe")
