"""Paths inside disks, and what patterns of them mean."""

from __future__ import annotations

import pytest

from hvmgr.model import patterns


@pytest.mark.parametrize(
    ("path", "pattern", "counts"),
    [
        (b"/etc/passwd", b"/etc", [1]),
        (b"/etc/passwd", b"/", [0]),
        (b"/etc/passwd", b"/etc/*", [2]),
        (b"/etc/.hidden", b"/etc/*", []),
        (b"/etc/.hidden", b"/etc/.*", [2]),
        (b"/a/b/c", b"/**", [0, 1, 2, 3]),
        (b"/a/b/c", b"/**/c", [3]),
        (b"/a/*/c", b"/a/*", [2]),
        (b"/a/[x]/c", b"/a/[x]", [2]),
        (b"/a", b"/a/b", []),
    ],
)
def test_beginnings_of_paths_are_what_patterns_mean(path, pattern, counts):
    parts = [patterns.parts_of(one) for one in (path, pattern)]
    assert sorted(patterns.beginnings(*parts, ignoring_case=False)) == counts


def test_windows_paths_ignore_case():
    parts = patterns.parts_of(rb"C:\Users\X", ignoring_case=True)
    assert list(patterns.beginnings([b"users", b"x", b"y"], parts, ignoring_case=True)) == [2]


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("straße", "STRASSE", False),
        ("Ä.txt", "ä.TXT", True),
        ("ﬀ", "FF", False),
        ("\u0130", "i", False),
        ("\U00010428", "\U00010400", False),
    ],
)
def test_case_is_ignored_as_file_systems_do(one, other, are_same):
    assert (patterns.folded(one) == patterns.folded(other)) is are_same
