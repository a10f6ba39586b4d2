"""Records what QEMU answers to the programs of tests/qtest_programs.py and tests/qtest_its.py.

``python tools/record_qtest.py`` renews tests/golden/qtest and prints how fabric compares. It takes a
qemu-system-aarch64 with the accelerator qtest, from PATH or FABRIC_QEMU_AARCH64.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Record, save, compare."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from qtest_client import find_emulator
    from qtest_differences import Comparison
    from qtest_players import simulate
    from qtest_recording import PATH, record, save

    emulator = find_emulator()
    recorded = list(record(emulator))
    save(emulator, recorded)
    comparison = Comparison()
    for each in recorded:
        program = each.program
        comparison.add(program, each.answers, simulate(program.machine, program.steps))
    print(comparison)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
