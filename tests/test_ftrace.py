"""Reading traces: every dialect, exact times, and nothing that makes the reader fail on a line."""

from __future__ import annotations

import gzip
import io
import lzma
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fabric.errors import ConfigError
from fabric.scenario.ftrace import ImportReport, TraceEvent, parse_trace, read_trace

EXAMPLES = Path(__file__).parent.parent / "examples"

ENTRY = "irq_handler_entry: irq=36 name=virtio1-req.0"


def one(line: str) -> TraceEvent:
    """The single event of a text."""
    [event] = parse_trace(line).events
    return event


# Where the parts of a line stand


@pytest.mark.parametrize(
    ("line", "comm", "pid", "cpu", "at_ns"),
    [
        ("  bash-12   [001] d.h..   993.571823: ", "bash", 12, 1, 993_571_823_000),
        ("  bash-12   [001] d.h.    993.571823: ", "bash", 12, 1, 993_571_823_000),
        ("  bash-12   [001] dNh.2.. 993.571823: ", "bash", 12, 1, 993_571_823_000),
        ("  bash-12   [034] 5446408.762620: ", "bash", 12, 34, 5_446_408_762_620_000),
        ("  bash-12   993.571823: ", "bash", 12, -1, 993_571_823_000),
        ("  bash-12   d.h.. 993.571823: ", "bash", 12, -1, 993_571_823_000),
        ("  bash-12     3d.h.. 993.571823: ", "bash", 12, 3, 993_571_823_000),
        ("  bash-12   (   12) [001] d.h..   993.571823: ", "bash", 12, 1, 993_571_823_000),
        ("  bash-12   (-----) [001] d.h..   993.571823: ", "bash", 12, 1, 993_571_823_000),
        ("  bash-12   [001] d.h..   993.571823001: ", "bash", 12, 1, 993_571_823_001),
        ("  <...>-1000  [001] .......  1000.000038: ", "<...>", 1000, 1, 1_000_000_038_000),
        ("  <idle>-0    [000] d.h1.  1000.000038: ", "<idle>", 0, 0, 1_000_000_038_000),
        ("  kworker/23:1-333  [023] d..1.  1.000001: ", "kworker/23:1", 333, 23, 1_000_001_000),
        ("  CPU 0/KVM-4201 [001] .......  1000.000038: ", "CPU 0/KVM", 4201, 1, 1_000_000_038_000),
        ("  a-1 b-2-77 [001] d.h.. 1.000001: ", "a-1 b-2", 77, 1, 1_000_001_000),
        ("swapper     0 [000]  1234.567890: irq:", "swapper", 0, 0, 1_234_567_890_000),
        ("CPU 0/KVM  4201 [003] 108229.924216:        irq:", "CPU 0/KVM", 4201, 3, 108_229_924_216_000),
        ("worker 7  4201/4205 [003] 1.000000009: irq:", "worker 7", 4201, 3, 1_000_000_009),
        ("worker 7  4201   1.000000009: irq:", "worker 7", 4201, -1, 1_000_000_009),
        ("swapper     0 [002]  5.000001:          1 irq:", "swapper", 0, 2, 5_000_001_000),
    ],
)
def test_dialects_of_a_line(line: str, comm: str, pid: int, cpu: int, at_ns: int) -> None:
    """COMM-PID or COMM PID, with or without CPU and flags, six or nine digits: the same event."""
    assert TraceEvent(at_ns, cpu, "irq-entry", "virtio1-req.0", 36, -1, 1, pid, comm) == one(line + ENTRY)


@given(st.integers(0, 10**10), st.integers(0, 10**9 - 1))
def test_times_are_exact(seconds: int, nanoseconds: int) -> None:
    """A time goes to integer nanoseconds without a float in between."""
    line = f"bash-1 [000] {seconds}.{nanoseconds:09}: {ENTRY}"

    assert seconds * 10**9 + nanoseconds == one(line).at_ns


# What the fields say


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("irq_handler_entry: irq=38 name=ahci[0000:00:1f.2]", ("irq-entry", "ahci[0000:00:1f.2]", 38, -1, 1)),
        ("irq_handler_entry: irq=1 handler=i8042", ("irq-entry", "i8042", 1, -1, 1)),
        ("irq_handler_entry: irq=24", ("irq-entry", "irq 24", 24, -1, 1)),
        ("irq_handler_exit: irq=38 ret=handled", ("irq-exit", "irq 38", 38, -1, 1)),
        ("irq_handler_exit: irq=38 return=unhandled", ("irq-exit", "irq 38", 38, -1, 0)),
        ("irq_handler_exit: irq=38 ret=1", ("irq-exit", "irq 38", 38, -1, 1)),
        ("softirq_entry: vec=3 [action=NET_RX]", ("deferred", "NET_RX", 3, -1, 1)),
        ("softirq_raise: vec=3", ("deferred", "irq 3", 3, -1, 1)),
        ("local_timer_entry: vector=236", ("vector-entry", "local_timer", 236, -1, 1)),
        ("irq_vectors:reschedule_entry: vector=253", ("vector-entry", "reschedule", 253, -1, 1)),
        ("thermal_apic_exit: vector=250", ("vector-exit", "thermal_apic", 250, -1, 1)),
        ("ipi_entry: (Rescheduling interrupts)", ("ipi-entry", "Rescheduling interrupts", -1, -1, 1)),
        ("ipi_send_cpu: cpu=3 callsite=f+0x1/0x2 callback=0x0", ("ipi-send", "f+0x1/0x2", -1, 3, 1)),
        ("kvm_set_irq: gsi 24 level 1 source 0", ("kvm-line", "gsi 24", 24, -1, 1)),
        ("kvm_set_irq: gsi 24 level 0 source 0", ("kvm-line", "gsi 24", 24, -1, 0)),
        (
            "kvm_irq_line: Inject VGIC SPI interrupt (1), vcpu->idx: 0, num: 78, level: 1",
            ("kvm-line", "intid 78", 78, 0, 1),
        ),
        ("kvm_irq_line: Inject VGIC SPI (1), vcpu->idx: 0, num: 78, level: 0", ("kvm-line", "intid 78", 78, 0, 0)),
        ("kvm_timer_update_irq: VCPU: 3, IRQ 27, level 1", ("kvm-line", "intid 27", 27, 3, 1)),
        ("vgic_update_irq_pending: VCPU: 3, IRQ 27, level: 1", ("kvm-accepted", "intid 27", 27, 3, 1)),
        ("kvm_pic_set_irq: chip 1 pin 4 (edge|masked)", ("kvm-routed", "pic 1 pin 4", 4, -1, 0)),
        (
            "kvm_ioapic_set_irq: pin 4 dst 1 vec 49 (Fixed|physical|edge)",
            ("kvm-routed", "ioapic pin 4", 49, 1, 1),
        ),
        (
            "kvm_ioapic_set_irq: pin 4 dst 1 vec=49 (Fixed|physical|edge) (coalesced)",
            ("kvm-routed", "ioapic pin 4", 49, 1, 0),
        ),
        (
            "kvm_msi_set_irq: dst 65 vec 35 (Fixed|physical|edge)",
            ("kvm-routed", "msi dst 65 vec 35", 35, 65, 1),
        ),
        (
            "kvm_msi_set_irq: dst 1 vec b1 (Fixed|physical|edge|rh)",
            ("kvm-routed", "msi dst 1 vec 177", 177, 1, 1),
        ),
        ("kvm_apic_ipi: dst b0 vec 176 (Fixed|physical|assert|edge|self)", ("kvm-ipi", "ipi vec 176", 176, 0xB0, 1)),
        ("kvm_apic_ipi: dst 1 vec 0 (INIT|physical|assert|level|dst)", ("kvm-ipi", "ipi vec 0", 0, 1, 0)),
        ("kvm:kvm_apic_accept_irq: apicid 10 vec 236 (Fixed|edge)", ("kvm-accepted", "vec 236", 236, 16, 1)),
        ("kvm_inj_virq: irq 52", ("kvm-injected", "vec 52", 52, -1, 1)),
        ("kvm_inj_virq: IRQ 0xb0", ("kvm-injected", "vec 176", 176, -1, 1)),
        ("kvm_inj_virq: Soft/INTn 0x20 [reinjected]", ("kvm-injected", "vec 32", 32, -1, 1)),
        ("kvm_ack_irq: irqchip PIC master pin 0", ("kvm-ack", "PIC master pin 0", 0, -1, 1)),
        ("kvm_eoi: apicid a vector 236", ("kvm-eoi", "vec 236", 236, 10, 1)),
        ("kvm_pv_eoi: apicid 0 vector 52", ("kvm-eoi", "vec 52", 52, 0, 1)),
    ],
)
def test_fields_of_each_event(text: str, expected: tuple[str, str, int, int, int]) -> None:
    """Kind, source, vector, target and value, over the kernel versions' spellings."""
    event = one(f"CPU 1/KVM-9 [002] d.h.. 1.000001: {text}")

    assert expected == (event.kind, event.source, event.vector, event.target, event.value)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("ipi_raise: target_mask=00000002,00000005 (Function call interrupts)", [0, 2, 33]),
        ("ipi_send_cpumask: cpumask=0,2-4 callsite=f callback=0x0", [0, 2, 3, 4]),
    ],
)
def test_an_ipi_to_several_cpus_is_several_events(text: str, targets: list[int]) -> None:
    """A mask and a list both name every CPU; the line still counts once."""
    trace = parse_trace(f"bash-9 [002] d.h.. 1.000001: {text}")

    assert targets == [event.target for event in trace.events]
    assert 1 == trace.report.events


# The report


HEADED = f"""# tracer: nop
#
# entries-in-buffer/entries-written: 3/5   #P:8
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
            bash-9      [002] d.h..     1.000001: {ENTRY}
            bash-9      [002] d.h..     1.000004: sched_switch: prev_comm=a:b ==> next_comm=c
            bash-9      [002] d.h..     1.000005: irq_handler_exit: irq=broken
            bash-9      [002] d.h..     1.000006: sched_switch: prev_comm=c ==> next_comm=a
            bash-9      [002] d.h..     1.000007: do_IRQ <-ret_from_intr

        ffffffff810a1b2c do_something ([kernel.kallsyms])
CPU:1 [LOST 120 EVENTS]
            bash-9      [002] d.h..     1.000000: {ENTRY}
"""


def test_every_line_is_accounted_for() -> None:
    """Understood by event, not understood by reason with the first example, headers and lost events."""
    report = parse_trace(HEADED, "t").report

    assert {"irq_handler_entry": 2} == report.understood
    assert {
        "sched_switch": (2, 8),
        "fields of irq_handler_exit not understood": (1, 9),
        "no event on the line": (2, 11),
    } == {reason: (ignored.count, ignored.line) for reason, ignored in report.ignored.items()}
    assert report.ignored["sched_switch"].example.endswith("prev_comm=a:b ==> next_comm=c")
    assert ("nop", 3, 5, 8, 120) == (
        report.tracer,
        report.entries_in_buffer,
        report.entries_written,
        report.cpus,
        report.lost_events,
    )
    assert_complete(report)


def assert_complete(report: ImportReport) -> None:
    ignored = sum(ignored.count for ignored in report.ignored.values())

    assert report.lines == report.blank + report.events + ignored


def test_events_are_sorted_by_time() -> None:
    """Buffers of several CPUs may be written one after the other; the report says how often time went back."""
    trace = parse_trace(HEADED)

    assert [1_000_000_000, 1_000_001_000] == [event.at_ns for event in trace.events]
    assert 1 == trace.report.out_of_order


def test_windows_line_ends() -> None:
    """A trace that came through another system says the same."""
    assert parse_trace(HEADED).events == parse_trace(HEADED.replace("\n", "\r\n")).events


def test_headers_of_the_other_tools() -> None:
    """trace-cmd and perf give the number of CPUs in their own words."""
    line = f"bash-9 [002] 1.000001: {ENTRY}\n"

    assert 4 == parse_trace("cpus=4\n" + line).report.cpus
    assert 16 == parse_trace("# nrcpus online : 16\n" + line).report.cpus


# Any text


@given(st.lists(st.one_of(st.text(), st.from_regex(r"[\w<>.-]+-\d+ +\[\d+\] +\d+\.\d+: \w+: .*"))))
@example(["0-0 [000] d... " + "9" * 5000 + ".000000: x"])
@example(["a-0 [000] 1.000000: ipi_send_cpumask: cpumask=0-99999999999 callsite=x"])
@example(["a-0 [000] 1.000000: kvm_msi_set_irq: dst zz vec 0x (Fixed)"])
@example(["a" + " " * 20_000, "a-1" * 8000])
def test_no_line_makes_the_reader_fail(lines: list[str]) -> None:
    """Whatever a line holds, it is understood or counted."""
    report = parse_trace("\n".join([*lines, f"bash-9 [002] 1.000001: {ENTRY}"])).report

    assert report.understood["irq_handler_entry"] >= 1
    if not any("send_cpumask" in line for line in lines):
        assert_complete(report)


# Files


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, lzma.compress], ids=["plain", "gz", "xz"])
def test_compression_is_told_by_content(pack: object, tmp_path: Path) -> None:
    """Plain, gzip and xz, whatever the name; by path or as an open file."""
    assert callable(pack)
    path = tmp_path / "trace"
    path.write_bytes(pack(HEADED.encode()))
    expected = parse_trace(HEADED).events

    assert expected == read_trace(path).events
    assert expected == read_trace(str(path)).events
    with path.open("rb") as file:
        assert expected == read_trace(file).events


def test_an_open_text_file() -> None:
    """A text stream is read as it is."""
    assert 2 == len(read_trace(io.StringIO(HEADED)).events)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "the trace is empty", id="empty"),
        pytest.param(b"# only\n# comments\n", "the trace is empty", id="comments"),
        pytest.param(b"hello\nworld\n", r"none of its 2 lines .* no event on the line \(2\)", id="text"),
        pytest.param(b"a-1 [000] 1.000001: sched_switch: x\n", r"found: sched_switch \(1\)", id="others"),
        pytest.param(gzip.compress(HEADED.encode())[:-20], "damaged or cut short", id="cut-gz"),
        pytest.param(lzma.compress(HEADED.encode())[:-20], "damaged or cut short", id="cut-xz"),
        pytest.param(b"\x1f\x8bnonsense", "cannot be read", id="no-gz"),
        pytest.param(b"\x17\x08\x44tracing6", "binary recording.*trace-cmd report", id="trace.dat"),
        pytest.param(b"PERFILE2....", "binary recording.*perf script", id="perf.data"),
        pytest.param(bytes(range(256)), "none of its", id="bytes"),
    ],
)
def test_a_useless_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    """The error names the file and says what was found instead."""
    path = tmp_path / "some.txt"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=words) as caught:
        read_trace(path)

    assert str(path) == caught.value.where


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """An unreadable file is a request that was wrong, not a crash."""
    with pytest.raises(ConfigError, match="cannot be read: no such file"):
        read_trace(tmp_path / "absent")
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        read_trace(tmp_path)


def test_the_recorded_trace() -> None:
    """The whole trace of the examples is understood."""
    report = read_trace(EXAMPLES / "virtio-blk-2cpu.txt.gz").report

    assert {
        "call_function_single_entry": 227,
        "irq_handler_entry": 26_701,
        "irq_handler_exit": 26_701,
        "local_timer_entry": 5_875,
        "reschedule_entry": 14_830,
    } == report.understood
    assert {} == report.ignored
    assert (74_334, 2, 0) == (report.entries_written, report.cpus, report.out_of_order)
