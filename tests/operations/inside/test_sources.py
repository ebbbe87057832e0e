"""What is put: files of this host whose folders are swapped meanwhile, that say another size, or have holes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvmgr import errors
from hvmgr.model import plan
from hvmgr.operations.inside import looking, putting, sources, views
from hvmgr.operations.inside.browsing import DAMAGED
from hvmgr.operations.inside.kernel_writing import KernelWriter
from hvmgr.operations.steps import put_steps
from hvmgr.storage.filesystems.reader import Type
from tests.storage import file_trees

RUN = "/run/hvmgr/0123456789ab"


@pytest.fixture
def tree(tmp_path):
    made = tmp_path / "tree"
    (made / "a" / "a").mkdir(parents=True)
    (made / "a" / "a" / "file").write_bytes(b"mine")
    (made / "b").symlink_to("a")
    os.mkfifo(made / "pipe")
    return made


def gathered(*paths):
    return sources.of_host(paths)


def test_a_tree_is_gathered_with_folders_first(tree, tmp_path):
    (tmp_path / "named").symlink_to(tree)
    found = gathered(tmp_path / "named")
    assert [(b"/".join(one.parts), one.type) for one in found.items] == [
        (b"named", Type.FOLDER),
        (b"named/a", Type.FOLDER),
        (b"named/a/a", Type.FOLDER),
        (b"named/a/a/file", Type.FILE),
        (b"named/b", Type.LINK),
    ]
    assert found.left_out == {sources.SPECIAL: 1}
    assert b"".join(found.items[3].source.pieces(3)) == b"mine"
    assert found.items[3].origin == str(tmp_path / "named/a/a/file")


def test_a_folder_that_becomes_a_link_while_it_is_walked_is_not_followed(tree, tmp_path, monkeypatch):
    secret, really = tmp_path / "secret", os.open
    (secret / "a").mkdir(parents=True)

    def swapping(name, flags, **where):
        if name == b"a" and not (tree / "a").is_symlink():
            (tree / "a").rename(tmp_path / "away")
            (tree / "a").symlink_to(secret)
        return really(name, flags, **where)

    monkeypatch.setattr(os, "open", swapping)
    with pytest.raises(errors.Conflict, match="tree/a was changed while it was looked at"):
        gathered(tree)


def test_a_folder_that_becomes_a_link_before_its_file_is_read_is_not_followed(tree, tmp_path):
    (*_, file, _) = gathered(tree).items
    (tree / "a").rename(tmp_path / "away")
    (tree / "a").symlink_to(tmp_path / "away")  # the very same file
    with pytest.raises(errors.Conflict, match="tree/a/a/file was changed while it was read"):
        list(file.source.pieces(10))


@pytest.mark.parametrize("name", ["/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_a_file_that_does_not_say_its_size_is_refused(tmp_path, require, name):
    require(Path(name).exists(), f"needs {name}")
    (one,) = gathered(Path(name)).items
    with (
        pytest.raises(errors.Conflict, match=f"{name} does not hold the {one.size} bytes"),
        one.source.opened(tmp_path),
    ):
        pass


def test_holes_take_no_room(tmp_path, monkeypatch):
    with (tmp_path / "sparse").open("wb") as file:
        file.write(b"data")
        file.truncate(1 << 40)
    (item,) = gathered(tmp_path / "sparse").items
    acts = [SimpleNamespace(item=item)]
    monkeypatch.setattr(putting.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))

    def room(acts, writer, *, is_inside=False):
        session = SimpleNamespace(layout=SimpleNamespace(images=tmp_path))
        putting._require_room(session, SimpleNamespace(lock=None), acts, writer, is_inside=is_inside)

    room(acts, object())
    with pytest.raises(errors.NoSpace, match=r"takes 1\.0 TiB in"):  # a kernel fills them
        room(acts, KernelWriter("xfs", keeps_owners=True))
    with (tmp_path / "whole").open("wb") as file:
        file.write(bytes(1 << 20))
    acts = [SimpleNamespace(item=gathered(tmp_path / "whole").items[0])]
    monkeypatch.setattr(putting.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 19))
    room(acts, object())
    for writer, is_inside in ((object(), True), (KernelWriter("xfs", keeps_owners=True), False)):  # both make copies
        with pytest.raises(errors.NoSpace, match=r"takes 2\.0 MiB in"):
            room(acts, writer, is_inside=is_inside)


def test_what_another_moment_holds_comes_with_its_holes():
    content = SimpleNamespace(
        size=1000,
        pieces=lambda: iter([(10, memoryview(b"x" * 50)), (500, b"y" * 7)]),
        ranges=lambda: [(10, 60), (500, 507)],
    )
    one = sources._InsideFile(SimpleNamespace(content=lambda _: content), None)
    pieces = list(one.pieces(64))
    assert max(map(len, pieces)) <= 64
    assert (
        hashlib.sha256(b"".join(pieces)).digest()
        == hashlib.sha256(bytes(10) + b"x" * 50 + bytes(440) + b"y" * 7 + bytes(493)).digest()
    )
    assert one.data_size() == 57


def test_what_is_damaged_at_another_moment_is_counted(tree, tmp_path):
    image = file_trees.ext(tmp_path / "image", tree, "-t", "ext4", size="8M")
    file_trees.run("debugfs", "-w", "-R", "ln /a /a/a/again", image)
    with looking.opened([views.of_image(image, "raw")]) as inside:
        browser = inside.choose(b"/")
        found = sources.of_browser([(browser, browser.find(b"/a"))], whole_path=True)
    assert found.left_out == {DAMAGED: 1}
    assert [b"/".join(one.parts) for one in found.items] == [b"a", b"a/a", b"a/a/file"]


def test_a_put_that_was_killed_leaves_no_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(put_steps.exporting, "clear", lambda _: None)
    step = plan.PutFiles(child="c", parent="p", volume="v", files=1, size=1, work=RUN)
    spools = []
    session = SimpleNamespace(layout=SimpleNamespace(private=tmp_path))

    class Killed(BaseException):
        pass

    def write(_session, _step, spool):
        spools.append(spool)
        (spool / "contents").write_bytes(b"x")
        raise Killed

    session.putting = SimpleNamespace(write=write)
    session.lent = lambda _: contextlib.nullcontext()
    with pytest.raises(Killed):
        put_steps.put(session, step)
    assert spools == [tmp_path / "put-0123456789ab"]
    session.putting = None  # another process
    put_steps.unput(session, step)
    assert list(tmp_path.iterdir()) == []
    put_steps.unput(session, step)
