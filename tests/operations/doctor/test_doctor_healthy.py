"""Nothing is wrong where nothing is wrong."""

from __future__ import annotations


def test_x(bench, vm):
    for f in bench.host.doctor():
        print(f)
    for f in bench.host.doctor(vm.name, thorough=True):
        print(f)
