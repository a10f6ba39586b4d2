"""The 8254 timer: three channels at 1.193182 MHz, ports 0x40 to 0x43, and port 0x61 for the speaker's channel.

Channel 0 raises GSI 0. Its ticks are counted in virtual time; how those that come faster than the guest takes them are
treated is the reinjection policy: with reinjection a tick waits until the guest has acknowledged the one before, and is
raised then; without, each is raised as it comes, and merges with one that still waits.

Sources: Intel 8254 data sheet; struct kvm_pit_state2 and KVM_REINJECT_CONTROL of the KVM API document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.memory import MmioHandler

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.base import VmServices

FREQUENCY = 1_193_182
PORT_CHANNEL0, PORT_CONTROL, PORT_SPEAKER = 0x40, 0x43, 0x61
MIN_PERIOD_NS = 200_000
"""A periodic timer of KVM's is not faster (module parameter min_timer_period_us)."""
LATCH, LOW, HIGH, LOW_HIGH = range(4)
"""What a control word says of the bytes of a count."""
_HIGH_NEXT = 4
"""State of a channel that has had the first of two bytes."""
FLAG_HPET_LEGACY = 1
FLAG_SPEAKER_ON = 2

STATE = (
    "count",
    "latched_count",
    "count_latched",
    "status_latched",
    "status",
    "read_state",
    "write_state",
    "write_latch",
    "rw_mode",
    "mode",
    "bcd",
    "gate",
    "count_load_time",
)
"""The members of struct kvm_pit_channel_state."""


def to_ns(ticks: int) -> int:
    """Ticks of the 8254 in ns."""
    return ticks * 1_000_000_000 // FREQUENCY


class Channel:
    """One counter; its registers have the names of struct kvm_pit_channel_state."""

    __slots__ = (*STATE, "pit")

    count: int
    latched_count: int
    count_latched: int
    status_latched: int
    status: int
    read_state: int
    write_state: int
    write_latch: int
    rw_mode: int
    mode: int
    bcd: int
    gate: int
    count_load_time: int

    def __init__(self, pit: Pit, gate: int) -> None:
        self.pit = pit
        for name in STATE:
            setattr(self, name, 0)
        self.count = 0x10000
        self.mode = 0xFF
        self.gate = gate

    @property
    def elapsed(self) -> int:
        """Ticks since the count was loaded; of channel 0, which has a timer, since that began its period."""
        pit = self.pit
        since = pit.begun if self is pit.channels[0] else self.count_load_time
        return 0 if since is None else (pit.now - since) * FREQUENCY // 1_000_000_000

    @property
    def counter(self) -> int:
        """What the counter shows."""
        if self.mode in (0, 1, 4, 5):
            return self.count - self.elapsed & 0xFFFF
        if self.mode == 3:
            return self.count - 2 * self.elapsed % self.count
        return self.count - self.elapsed % self.count

    @property
    def out(self) -> int:
        """The level of its output."""
        elapsed = self.elapsed
        if self.mode == 1:
            return int(elapsed < self.count)
        if self.mode == 2:
            return int(elapsed % self.count == 0 and elapsed != 0)
        if self.mode == 3:
            return int(elapsed % self.count < self.count + 1 >> 1)
        if self.mode in (4, 5):
            return int(elapsed == self.count)
        return int(elapsed >= self.count)

    def set_gate(self, gate: int) -> None:
        """Drive the gate: a rising edge starts the count anew in modes 1, 2, 3 and 5."""
        if gate and not self.gate and self.mode in (1, 2, 3, 5):
            self.count_load_time = self.pit.now
        self.gate = gate

    def latch_count(self) -> None:
        """Keep the counter's value for the next read."""
        if not self.count_latched:
            self.latched_count = self.counter
            self.count_latched = self.rw_mode

    def latch_status(self) -> None:
        """Keep the status for the next read."""
        if not self.status_latched:
            self.status = self.out << 7 | self.rw_mode << 4 | self.mode << 1 | self.bcd
            self.status_latched = 1

    def read(self) -> int:
        """A byte: the status, a latched count, or the counter."""
        if self.status_latched:
            self.status_latched = 0
            return int(self.status)
        if self.count_latched:
            value = self.latched_count
            if self.count_latched == LOW_HIGH:
                self.count_latched = HIGH
                return int(value & 0xFF)
            high = self.count_latched != LOW
            self.count_latched = 0
            return int(value >> 8 if high else value & 0xFF)
        value = self.counter
        if self.read_state == LOW_HIGH:
            self.read_state = _HIGH_NEXT
            return value & 0xFF
        if self.read_state == _HIGH_NEXT:
            self.read_state = LOW_HIGH
            return value >> 8 & 0xFF
        return value >> 8 & 0xFF if self.read_state == HIGH else value & 0xFF

    def write(self, value: int) -> int | None:
        """A byte of the count; the count once it is whole."""
        if self.write_state == LOW_HIGH:
            self.write_latch = value
            self.write_state = _HIGH_NEXT
            return None
        if self.write_state == _HIGH_NEXT:
            self.write_state = LOW_HIGH
            return int(self.write_latch | value << 8)
        return value << 8 if self.write_state == HIGH else value


class Pit(MmioHandler):
    """The 8254 of a VM.

    Args:
        vm: its VM.
        drive: drives GSI 0.
        speaker: port 0x61 is here as well.
    """

    __slots__ = (
        "_drive",
        "_timer",
        "acknowledged",
        "begun",
        "channels",
        "flags",
        "owed",
        "period",
        "reinject",
        "vm",
    )

    def __init__(self, vm: VmServices, drive: Callable[[bool], None], *, speaker: bool) -> None:
        self.vm = vm
        self._drive = drive
        clock: Any = vm.clock
        self._timer = clock.timer(self._tick, name="PIT")
        self.channels = (Channel(self, 1), Channel(self, 1), Channel(self, 0))
        self.flags = 0
        self.reinject = True
        self.acknowledged = True
        """The guest took the last tick."""
        self.owed = 0
        """Ticks to be raised, with reinjection."""
        self.period = 0
        """ns between the ticks of channel 0; 0 for one that ticks once."""
        self.begun: int | None = None
        """When the timer of channel 0 began its period; None before there was one."""
        for channel in self.channels[1:]:
            channel.count_load_time = self.now
        vm.pio.add(PORT_CHANNEL0, 4, self)
        if speaker:
            vm.pio.add(PORT_SPEAKER, 1, SpeakerPort(self))

    @property
    def now(self) -> int:
        """Virtual time in ns."""
        return self.vm.clock.now

    # -- ticks

    def load(self, number: int, count: int) -> None:
        """A channel gets a count; 0 is 65536. The load time of channel 0 is not kept: it has a timer."""
        channel = self.channels[number]
        channel.count = count or 0x10000
        if number:
            channel.count_load_time = self.now
        else:
            self._start()

    def _start(self) -> None:
        """Channel 0 was loaded: once in modes 0, 1 and 4, again and again in 2 and 3."""
        channel = self.channels[0]
        self._timer.cancel()
        self.reset_reinjection()
        if self.flags & FLAG_HPET_LEGACY:
            return
        length = to_ns(channel.count)
        if channel.mode in (0, 1, 4):
            self.period = 0
            self.begun = self.now
            self._timer.arm(self.now + length)
        elif channel.mode in (2, 3):
            # The first tick comes when it is due, the next ones not too fast.
            self.period = max(length, MIN_PERIOD_NS)
            self.begun = self.now + length - self.period
            self._timer.arm_periodic(self.now + length, self.period)

    def _tick(self) -> None:
        if self.period:
            self.begun = self.now
        if self.reinject:
            self.owed += 1
        self._raise()

    def _raise(self) -> None:
        if self.reinject:
            if not self.acknowledged:
                return
            self.acknowledged = False
        self._drive(True)
        self._drive(False)
        self.vm.irqchip.apics.watchdog_tick()

    def ended(self) -> None:
        """The guest ended an interrupt of GSI 0."""
        if not self.reinject:
            return
        self.acknowledged = True
        if self.owed:
            self.owed -= 1
            if self.owed:
                self._raise()

    def reset_reinjection(self) -> None:
        """No tick is owed: the timer was set anew, or its interrupt unmasked."""
        self.owed = 0
        self.acknowledged = True

    # -- ports

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        """Ports 0x40 to 0x42; the control port cannot be read."""
        return self.channels[offset].read() if offset < 3 else 0

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        """A byte to ports 0x40 to 0x43."""
        value &= 0xFF
        if offset < 3:
            count = self.channels[offset].write(value)
            if count is not None:
                self.load(offset, count)
            return
        number = value >> 6
        if number == 3:
            self._read_back(value)
            return
        channel = self.channels[number]
        access = value >> 4 & 3
        if access == LATCH:
            channel.latch_count()
            return
        channel.rw_mode = channel.read_state = channel.write_state = access
        mode = value >> 1 & 7
        channel.mode = mode & 3 if mode > 5 else mode
        channel.bcd = value & 1

    def _read_back(self, value: int) -> None:
        for number, channel in enumerate(self.channels):
            if value >> number + 1 & 1:
                if not value & 0x20:
                    channel.latch_count()
                if not value & 0x10:
                    channel.latch_status()

    # -- state

    def state(self) -> dict[str, Any]:
        """The members of struct kvm_pit_state2."""
        return {
            "channels": tuple({name: getattr(channel, name) for name in STATE} for channel in self.channels),
            "flags": self.flags,
        }

    def set_state(self, channels: tuple[dict[str, int], ...], flags: int) -> None:
        """As read by :meth:`state`, any values. The counts are loaded; channel 0 keeps its load time all the same."""
        self.flags = flags
        for channel, state in zip(self.channels, channels, strict=True):
            for name in STATE:
                setattr(channel, name, state[name])
        for number, channel in enumerate(self.channels):
            self.load(number, channel.count)

    def close(self) -> None:
        """The VM goes away."""
        self._timer.cancel()


class SpeakerPort(MmioHandler):
    """Port 0x61: gate and output of channel 2."""

    __slots__ = ("pit",)

    def __init__(self, pit: Pit) -> None:
        self.pit = pit

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        """Speaker data, gate, the refresh clock (which toggles every 15 us), and the output."""
        channel = self.pit.channels[2]
        refresh = self.pit.now >> 14 & 1
        speaker = bool(self.pit.flags & FLAG_SPEAKER_ON)
        return speaker << 1 | channel.gate | refresh << 4 | channel.out << 5

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None:
        """Speaker data (bit 1) and gate (bit 0)."""
        self.pit.flags = self.pit.flags & ~FLAG_SPEAKER_ON | value & FLAG_SPEAKER_ON
        self.pit.channels[2].set_gate(value & 1)
