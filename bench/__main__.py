"""``python -m bench [NAME]…``: measures everything, or only what is named, and prints one table."""

from __future__ import annotations

import sys
import time
import traceback

from bench import (
    ansible,
    beside_libvirt,
    boot,
    exchange,
    exchange_import,
    harness,
    hook,
    http,
    inside,
    live,
    live_merge,
    native,
    netboot,
    running_backup,
    snapshots,
    transfer,
    vhd,
    wim,
)
from tests import private_libvirt

SUITES = {
    "snapshots": snapshots.measure,
    "hook": hook.measure,
    "live": live.measure,
    "live_merge": live_merge.measure,
    "beside_libvirt": beside_libvirt.measure,
    "import": exchange_import.measure,
    "exchange": exchange.measure,
    "vhd": vhd.measure,
    "wim": wim.measure,
    "transfer": transfer.measure,
    "running_backup": running_backup.measure,
    "http": http.measure,
    "inside": inside.measure,
    "ansible": ansible.measure,
    "boot": boot.measure,
    "native": native.measure,
    "netboot": netboot.measure,
}


def main(names: list[str]) -> None:
    """The table on stdout, what is being done on stderr; a suite that fails is told and costs no other one its figures."""
    if unknown := set(names) - set(SUITES):
        raise SystemExit(f"bench: no {', '.join(sorted(unknown))}; there is {', '.join(SUITES)}")
    start = time.monotonic()
    results: list[harness.Result] = []
    failed: list[str] = []
    for name in names or SUITES:
        try:
            results += SUITES[name](_say)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the others are measured all the same, the end says it
            traceback.print_exception(error)
            failed.append(name)
    judged = [result.is_met for result in results if result.is_met is not None]
    print(harness.table(results))
    print(f"\n{sum(judged)} of {len(judged)} aims met, {time.monotonic() - start:.0f} s")
    if failed:
        raise SystemExit(f"bench: failed: {', '.join(failed)}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    private_libvirt.take_place_of_init()
    main(sys.argv[1:])
