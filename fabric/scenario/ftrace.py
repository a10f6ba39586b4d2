"""Reads the text that ftrace (the ``trace`` file), ``trace-cmd report`` and ``perf script`` give.

A line of the first two is ``COMM-PID [CPU] FLAGS SECS: EVENT: FIELDS``, of the third ``COMM PID [CPU] SECS:
GROUP:EVENT: FIELDS``. COMM may hold blanks, slashes and dashes; the CPU may be missing; FLAGS are missing or four
to seven characters; seconds have six or nine digits after the point. The text of the fields differs by kernel
version, so each row of the table below accepts all variants known.

The importer is lenient: a line it does not understand is counted, by event name or by what is wrong with it, with
the first one as an example; only a file without any event of the table is refused. Times become integer
nanoseconds without passing through a float.

Understood are the events of ``irq:``, ``irq_vectors:`` and ``ipi:``, and those of ``kvm:`` that carry an interrupt.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import zlib
from pathlib import Path
from typing import IO, Any

import attrs

from fabric.errors import ConfigError

# What kinds of event there are. An interrupt's way through KVM is "line" (an input of an interrupt controller
# moved) -> "routed" (it became a message or a pin of a chip) -> "accepted" (by a vCPU's controller) -> "injected"
# (seen by the vCPU on entry) -> "eoi".
IRQ_ENTRY, IRQ_EXIT = "irq-entry", "irq-exit"
VECTOR_ENTRY, VECTOR_EXIT = "vector-entry", "vector-exit"
IPI_SEND, IPI_ENTRY, IPI_EXIT = "ipi-send", "ipi-entry", "ipi-exit"
KVM_IPI, KVM_LINE, KVM_ROUTED, KVM_ACCEPTED = "kvm-ipi", "kvm-line", "kvm-routed", "kvm-accepted"
KVM_INJECTED, KVM_ACK, KVM_EOI = "kvm-injected", "kvm-ack", "kvm-eoi"
DEFERRED = "deferred"

_LINE = re.compile(
    r"\s*(\S.{0,63}?)(?:-|\s+)(\d+)(?:/\d+)?\s+"  # COMM-PID, COMM PID, COMM PID/TID
    r"(?:\(\s*[-\d]+\)\s+)?"  # (TGID), with the record-tgid option
    r"(?:\[(\d+)\]\s+|(\d+)(?=[dDbBX.]))?"  # [CPU], or CPU glued to the flags in the latency format
    r"(?:[dDbBX.?][\w.#?]{2,7}\s+)?"  # FLAGS: the first says "interrupts off", so it is never a digit
    r"(\d+)\.(\d{1,9}): +"  # seconds
    r"(?:\d+ +)?"  # perf's sample period
    r"(\S.*)"  # EVENT: FIELDS
)
_EVENT = re.compile(r"(?:[\w-]+:)?([\w.-]+):(?:\s+(.*))?$")
# An interrupt of KVM that takes no vector of its own on its way to a vCPU.
_MUTED = re.compile(r"masked|\(coalesced\)|\((?:NMI|INIT|SIPI|SMI|ExtINT)\|")
_COUNTS = re.compile(r"# entries-in-buffer/entries-written:\s*(\d+)/(\d+)\s+#P:(\d+)")
_TRACER = re.compile(r"# tracer: (\S+)")
_CPUS = re.compile(r"(?:# nrcpus online :|cpus=)\s*(\d+)")
_LOST = re.compile(r"CPU:\d+ \[LOST (\d+) EVENTS\]")

# An event is much shorter; what follows is not looked at, so that no line costs more than its share.
_LONGEST = 1024

# Interpretations are remembered by the text after the time, as the same few repeat; bounded for texts that do not.
_REMEMBERED = 1 << 16

# More than any kernel is built for: bounds what a list of CPUs may cost.
_MOST_CPUS = 8192


@attrs.frozen(slots=True)
class _Row:
    """How to read the fields of one event.

    Named groups of ``fields``: ``vector`` and ``target`` (decimal, or hexadecimal with ``0x`` or a letter in it),
    ``target_x`` (hexadecimal always), ``level``, ``name``. ``source`` is a format over the groups.
    """

    kind: str
    fields: re.Pattern[str]
    source: str


def _row(kind: str, fields: str, source: str = "{name}") -> _Row:
    return _Row(kind, re.compile(fields), source)


_HEX = "(?:0x)?[0-9a-f]+"

# Field texts: include/trace/events/irq.h, ipi.h and kvm.h, arch/x86/include/asm/trace/irq_vectors.h,
# arch/x86/kvm/trace.h, arch/arm64/kvm/trace_arm.h, arch/arm64/kvm/vgic/trace.h, over their versions since 2009.
_ROWS = {
    "irq_handler_entry": _row(IRQ_ENTRY, r"irq=(?P<vector>\d+)(?: (?:name|handler)=(?P<name>.+))?"),
    "irq_handler_exit": _row(IRQ_EXIT, r"irq=(?P<vector>\d+) (?:ret|return)=(?P<result>\w+)", "irq {vector}"),
    "softirq_entry": _row(DEFERRED, r"vec=(?P<vector>\d+)(?: \[action=(?P<name>\w+)\])?"),
    "softirq_exit": _row(DEFERRED, r"vec=(?P<vector>\d+)(?: \[action=(?P<name>\w+)\])?"),
    "softirq_raise": _row(DEFERRED, r"vec=(?P<vector>\d+)(?: \[action=(?P<name>\w+)\])?"),
    "ipi_raise": _row(IPI_SEND, r"target_mask=(?P<mask>[0-9a-f,]+) \((?P<name>.*)\)"),
    "ipi_send_cpu": _row(IPI_SEND, r"cpu=(?P<target>\d+) callsite=(?P<name>\S+)"),
    "ipi_send_cpumask": _row(IPI_SEND, r"cpumask=(?P<cpulist>[\d,-]+) callsite=(?P<name>\S+)"),
    "ipi_entry": _row(IPI_ENTRY, r"\((?P<name>.*)\)"),
    "ipi_exit": _row(IPI_EXIT, r"\((?P<name>.*)\)"),
    "kvm_set_irq": _row(KVM_LINE, r"gsi (?P<vector>\d+) level (?P<level>\d)", "gsi {vector}"),
    "kvm_irq_line": _row(
        KVM_LINE,
        r"Inject (?P<name>.+?)(?: interrupt)? \(\d+\), vcpu->idx: (?P<target>-?\d+), num: (?P<vector>\d+),"
        r" level: (?P<level>\d)",
        "intid {vector}",
    ),
    "kvm_timer_update_irq": _row(
        KVM_LINE, r"VCPU: (?P<target>-?\d+), IRQ (?P<vector>\d+), level (?P<level>\d)", "intid {vector}"
    ),
    "kvm_pic_set_irq": _row(KVM_ROUTED, r"chip (?P<chip>\d+) pin (?P<vector>\d+) \(", "pic {chip} pin {vector}"),
    "kvm_ioapic_set_irq": _row(
        KVM_ROUTED, rf"pin (?P<pin>\d+) dst (?P<target>{_HEX}) vec[ =](?P<vector>{_HEX}) \(", "ioapic pin {pin}"
    ),
    "kvm_msi_set_irq": _row(
        KVM_ROUTED, rf"dst (?P<target>{_HEX}) vec (?P<vector>{_HEX}) \(", "msi dst {target} vec {vector}"
    ),
    "kvm_apic_ipi": _row(KVM_IPI, r"dst (?P<target_x>[0-9a-f]+) vec (?P<vector>\d+) \(", "ipi vec {vector}"),
    "kvm_apic_accept_irq": _row(
        KVM_ACCEPTED, r"apicid (?P<target_x>[0-9a-f]+) vec (?P<vector>\d+) \(", "vec {vector}"
    ),
    "vgic_update_irq_pending": _row(
        KVM_ACCEPTED, r"VCPU: (?P<target>-?\d+), IRQ (?P<vector>\d+), level: (?P<level>\d)", "intid {vector}"
    ),
    "kvm_inj_virq": _row(
        KVM_INJECTED, rf"(?:irq|IRQ|Soft/INTn) (?P<vector>{_HEX})", "vec {vector}"
    ),
    "kvm_ack_irq": _row(KVM_ACK, r"irqchip (?P<name>.+) pin (?P<vector>\d+)", "{name} pin {vector}"),
    "kvm_eoi": _row(KVM_EOI, r"apicid (?P<target_x>[0-9a-f]+) vector (?P<vector>\d+)", "vec {vector}"),
    "kvm_pv_eoi": _row(KVM_EOI, r"apicid (?P<target_x>[0-9a-f]+) vector (?P<vector>\d+)", "vec {vector}"),
}  # fmt: skip

# irq_vectors: has a pair of events for each system vector, and all have the same field.
_VECTOR_ROWS = {
    "entry": _row(VECTOR_ENTRY, r"vector=(?P<vector>\d+)"),
    "exit": _row(VECTOR_EXIT, r"vector=(?P<vector>\d+)"),
}


@attrs.define(slots=True)
class TraceEvent:
    """One event of a trace, whatever text it came from."""

    at_ns: int
    """Nanoseconds on the trace's own clock."""
    cpu: int
    """The CPU that recorded it; -1 where the text does not say."""
    kind: str
    """One of the constants of this module."""
    source: str
    """What the event says the interrupt belongs to: ``virtio1-req.0``, ``local_timer``, ``gsi 24``, ``vec 236``."""
    vector: int
    """irq number, vector, GSI, pin or INTID, by kind; -1 without one."""
    target: int
    """The CPU, APIC id or vCPU it is for; -1 where the event does not say."""
    value: int
    """0 for a lowered line, a masked or coalesced pin, an NMI, INIT or SIPI, an unhandled irq; else 1."""
    pid: int
    comm: str


@attrs.define(slots=True)
class Ignored:
    """Lines that were not understood for one reason."""

    count: int
    line: int
    """Number of the first one."""
    example: str
    """Text of the first one, cut at 200 characters."""


@attrs.define(slots=True)
class ImportReport:
    """What became of every line of a trace."""

    where: str
    lines: int = 0
    blank: int = 0
    """Empty lines and comments."""
    understood: dict[str, int] = attrs.field(factory=dict)
    """Lines by event name."""
    ignored: dict[str, Ignored] = attrs.field(factory=dict)
    """Lines by reason: the name of an event of no use here, or what is wrong with the line."""
    cpus: int | None = None
    """CPUs of the traced machine, if a header says so."""
    tracer: str | None = None
    entries_in_buffer: int | None = None
    entries_written: int | None = None
    lost_events: int = 0
    """Events the kernel itself reports as overwritten."""
    out_of_order: int = 0
    """Events older than the one before; the events are sorted by time."""

    @property
    def events(self) -> int:
        """Lines understood."""
        return sum(self.understood.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON output, without the name of the file."""
        return attrs.asdict(self, filter=lambda attribute, _: attribute.name != "where")


@attrs.define(slots=True)
class Trace:
    """The events of a trace in time order, and the account of how they were read."""

    events: list[TraceEvent]
    report: ImportReport

    @property
    def cpus(self) -> int:
        """CPUs of the traced machine: what its header says, else those that events name."""
        return self.report.cpus or max(max(event.cpu, event.target) for event in self.events) + 1


@attrs.define(slots=True)
class _Meaning:
    """What the text after the time says; shared by all lines that say the same. ``kind`` is None: not understood."""

    name: str
    kind: str | None
    source: str = ""
    vector: int = -1
    targets: tuple[int, ...] = (-1,)
    value: int = 1
    count: int = 0


def read_trace(source: str | os.PathLike[str] | IO[bytes] | IO[str], where: str | None = None) -> Trace:
    """The trace in a file (plain, gzip or xz, told by content) or an open file, binary or text.

    ``where`` names it in messages; the file name by default. ConfigError if it cannot be read, or holds no event
    that is understood.
    """
    where = where or str(getattr(source, "name", source) if hasattr(source, "read") else os.fspath(source))
    return parse_trace(_text(source, where), where)


def parse_trace(text: str, where: str = "trace") -> Trace:
    """The trace in a text; as :func:`read_trace`."""
    report = ImportReport(where)
    events: list[TraceEvent] = []
    meanings: dict[str, _Meaning] = {}
    forgotten: list[_Meaning] = []
    previous = 0
    match = _LINE.match
    lines = (text.replace("\r\n", "\n") if "\r" in text else text).split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        found = match(line, 0, _LONGEST)
        if found is None or line[0] == "#":
            _without_event(report, number, line)
            continue
        comm, pid, cpu, glued_cpu, seconds, fraction, body = found.groups()
        meaning = meanings.get(body)
        if meaning is None:
            meaning = _interpret(body)
            if len(meanings) < _REMEMBERED:
                meanings[body] = meaning
            else:
                forgotten.append(meaning)
        meaning.count += 1
        if meaning.kind is None:
            _ignore(report, meaning.name, number, line)
            continue
        digits = len(fraction)
        at = int(seconds + fraction) * 10 ** (9 - digits)
        if at < previous:
            report.out_of_order += 1
        previous = at
        on = int(cpu or glued_cpu or -1)
        for target in meaning.targets:
            events.append(
                TraceEvent(at, on, meaning.kind, meaning.source, meaning.vector, target, meaning.value, int(pid), comm)
            )
    report.lines = len(lines)
    understood = report.understood
    for meaning in (*meanings.values(), *forgotten):
        if meaning.kind is not None:
            understood[meaning.name] = understood.get(meaning.name, 0) + meaning.count
    report.understood = dict(sorted(understood.items()))
    if not events:
        raise ConfigError(where, [_nothing_found(report)])
    if report.out_of_order:
        events.sort(key=lambda event: event.at_ns)  # stable: simultaneous events stay in file order
    return Trace(events, report)


def _interpret(body: str) -> _Meaning:
    found = _EVENT.match(body)
    if found is None:
        return _Meaning("no event on the line", None)
    name, fields = found[1], found[2] or ""
    row = _ROWS.get(name)
    source = ""
    if row is None:
        stem, _, half = name.rpartition("_")
        row = _VECTOR_ROWS.get(half)
        if row is None or not fields.startswith("vector="):
            return _Meaning(name, None)
        source = stem
    values = row.fields.match(fields)
    if values is None:
        return _Meaning(f"fields of {name} not understood", None)
    groups = {key: value for key, value in values.groupdict().items() if value is not None}
    vector = _number(groups["vector"]) if "vector" in groups else -1
    if not source:
        named = "name" in groups or "{name}" not in row.source
        source = row.source.format_map({**groups, "vector": vector}) if named else f"irq {vector}"
    muted = _MUTED.search(fields) is not None
    unhandled = groups.get("result") in ("unhandled", "0")
    value = 0 if groups.get("level") == "0" or muted or unhandled else 1
    return _Meaning(name, row.kind, source, vector, _targets(groups), value)


def _number(text: str) -> int:
    """A number whose base the kernel changed over time: hexadecimal where it shows, else decimal."""
    return int(text, 10 if text.lstrip("-").isdecimal() else 16)


def _targets(groups: dict[str, str]) -> tuple[int, ...]:
    if "target_x" in groups:
        return (int(groups["target_x"], 16),)
    if "target" in groups:
        return (_number(groups["target"]),)
    if "mask" in groups:  # 32-bit words, the most significant first
        mask = int("".join(word.zfill(8) for word in groups["mask"].split(",")), 16)
        return tuple(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1) or (-1,)
    if "cpulist" in groups:
        cpus: set[int] = set()
        for part in groups["cpulist"].split(","):
            first, _, last = part.partition("-")
            if first.isdecimal():
                cpus.update(range(int(first), min(int(last or first), _MOST_CPUS - 1) + 1))
        return tuple(sorted(cpus)) or (-1,)
    return (-1,)


def _ignore(report: ImportReport, reason: str, number: int, line: str, count: int = 1) -> None:
    known = report.ignored.get(reason)
    if known is None:
        report.ignored[reason] = Ignored(count, number, line.strip()[:200])
    else:
        known.count += count


def _without_event(report: ImportReport, number: int, line: str) -> None:
    """A comment, a header, an empty line, or something else that is no event."""
    stripped = line.strip()
    if counts := _COUNTS.match(stripped):
        report.entries_in_buffer, report.entries_written, report.cpus = map(int, counts.groups())
    elif tracer := _TRACER.match(stripped):
        report.tracer = tracer[1]
    elif cpus := _CPUS.match(stripped):
        report.cpus = int(cpus[1])
    elif lost := _LOST.match(stripped):
        report.lost_events += int(lost[1])
    elif stripped and not stripped.startswith("#"):
        _ignore(report, "no event on the line", number, line)
        return
    report.blank += 1


def _nothing_found(report: ImportReport) -> str:
    if not report.ignored:
        return "the trace is empty"
    common = sorted(report.ignored.items(), key=lambda item: -item[1].count)[:3]
    what = ", ".join(f"{reason} ({ignored.count})" for reason, ignored in common)
    return (
        f"none of its {report.lines} lines holds an irq:, irq_vectors: or kvm: event of an interrupt; found: {what};"
        " expected is the text of `trace-cmd report`, `perf script` or ftrace's `trace`"
    )


def _text(source: str | os.PathLike[str] | IO[bytes] | IO[str], where: str) -> str:
    try:
        if isinstance(source, str | os.PathLike):
            data: bytes | str = Path(source).read_bytes()
        else:
            data = source.read()
        if isinstance(data, str):
            return data
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        elif data.startswith(b"\xfd7zXZ\x00"):
            data = lzma.decompress(data)
    except UnicodeDecodeError as error:
        raise ConfigError(where, [f"the trace is no text: {error}"]) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(where, [f"the trace cannot be read: {reason[:1].lower() + reason[1:]}"]) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(where, [f"the compressed trace is damaged or cut short: {error}"]) from error
    for magic, tool in ((b"\x17\x08\x44tracing", "trace-cmd report"), (b"PERFILE2", "perf script")):
        if data.startswith(magic):
            raise ConfigError(where, [f"this is a binary recording; convert it with `{tool}` first"])
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", errors="replace", newline=None).read()
