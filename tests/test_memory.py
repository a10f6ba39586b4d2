"""Guest memory by slots and address spaces by ranges."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabric.errors import KvmError
from fabric.memory import AddressSpace, DirtyLog, GuestMemory
from fabric.uapi.kvm import KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
from fabric.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES as LOG
from fabric.uapi.kvm import KVM_MEM_READONLY as READONLY
from fabric.uapi.kvm import KvmUserspaceMemoryRegion as Region
from fabric.uapi.usermem import SparseMemory

PAGE = 4096
RAM = 0x8000_0000
USER = 0x7F00_0000_0000


def errno_of(call: Any, *args: Any) -> int:
    """The errno of a call that fails."""
    with pytest.raises(KvmError) as failure:
        call(*args)
    assert failure.value.errno is not None
    return failure.value.errno


@pytest.fixture
def memory() -> GuestMemory:
    """Sixteen pages at RAM, slot 0."""
    memory = GuestMemory()
    memory.add_ram(RAM, 16 * PAGE)
    return memory


class TestSetRegion:
    @pytest.mark.spec(
        "api.set-user-memory-region.EINVAL.flags",
        "api.set-user-memory-region.EINVAL.align",
        "api.set-user-memory-region.EINVAL.userspace-addr",
        "api.set-user-memory-region.EINVAL.slot",
        "api.set-user-memory-region.EINVAL.wrap",
        "api.set-user-memory-region.EINVAL.delete-absent",
        "api.set-user-memory-region.EINVAL.change",
    )
    @pytest.mark.parametrize(
        "region",
        [
            pytest.param(Region(1, 4, 0, PAGE, USER), id="unknown-flag"),
            pytest.param(Region(1, 0, 0x800, PAGE, USER), id="gpa-misaligned"),
            pytest.param(Region(1, 0, 0, PAGE + 1, USER), id="size-misaligned"),
            pytest.param(Region(1, 0, 0, (1 << 31) * PAGE, 0), id="too-many-pages"),
            pytest.param(Region(1, 0, 0, PAGE, USER + 1), id="user-misaligned"),
            pytest.param(Region(1, 0, 0, PAGE, 1 << 56 | USER), id="user-tagged"),
            pytest.param(Region(1, 0, 0, 2 * PAGE, (1 << 48) - PAGE), id="user-beyond-end"),
            pytest.param(Region(32767, 0, 0, PAGE, USER), id="slot-number"),
            pytest.param(Region(1 << 16, 0, 0, PAGE, USER), id="address-space"),
            pytest.param(Region(1, 0, (1 << 64) - PAGE, PAGE, USER), id="wrap"),
            pytest.param(Region(1, 0, 0, 0, USER), id="delete-absent"),
            pytest.param(Region(0, 0, RAM, 15 * PAGE, USER), id="resize"),
            pytest.param(Region(0, 0, RAM, 16 * PAGE, USER + PAGE), id="other-user-address"),
            pytest.param(Region(0, READONLY, RAM, 16 * PAGE, USER), id="other-readonly"),
        ],
    )
    def test_einval(self, memory: GuestMemory, region: Region) -> None:
        """What the kernel refuses with EINVAL changes nothing."""
        assert errno.EINVAL == errno_of(memory.set_region, region)
        assert [(0, RAM, RAM + 16 * PAGE, 0)] == [(s.slot, s.base, s.end, s.flags) for s in memory]

    @pytest.mark.spec("api.set-user-memory-region.EEXIST.overlap")
    @pytest.mark.parametrize("gpa", [RAM - PAGE, RAM, RAM + 15 * PAGE])
    def test_overlap(self, memory: GuestMemory, gpa: int) -> None:
        """A slot may not share a page with another one."""
        assert errno.EEXIST == errno_of(memory.set_region, Region(1, 0, gpa, 2 * PAGE, USER))

    @pytest.mark.spec("api.set-user-memory-region.EEXIST.overlap")
    def test_moving_onto_another_slot(self, memory: GuestMemory) -> None:
        """A slot may overlap where it was itself, but no other one."""
        memory.add_ram(RAM + 16 * PAGE, PAGE)
        memory.set_region(Region(0, 0, RAM - PAGE, 16 * PAGE, USER))

        assert errno.EEXIST == errno_of(memory.set_region, Region(0, 0, RAM + PAGE, 16 * PAGE, USER))
        assert [RAM - PAGE, RAM + 16 * PAGE] == [slot.base for slot in memory]

    @pytest.mark.spec("api.set-user-memory-region.rule.no-overlap")
    def test_address_spaces_are_apart(self) -> None:
        """Slots of different address spaces may overlap; accesses go to the first space."""
        memory = GuestMemory(address_spaces=2)
        memory.add_ram(RAM, PAGE)
        memory.set_region(Region(1 << 16, 0, RAM, 2 * PAGE, USER))

        assert not memory.is_backed(RAM + PAGE)
        memory._check()

    @pytest.mark.spec("api.set-user-memory-region.rule.no-resize")
    def test_moving_keeps_the_contents(self, memory: GuestMemory) -> None:
        """A moved slot shows the same user memory elsewhere."""
        memory.write(RAM + 5, b"here")
        memory.set_region(Region(0, 0, 0, 16 * PAGE, USER))

        assert b"here" == memory.read(5, 4)
        assert not memory.is_backed(RAM)

    def test_deleting(self, memory: GuestMemory) -> None:
        """Size 0 takes a slot away; its user memory stays what it was."""
        memory.write(RAM, b"kept")
        memory.set_region(Region(0, 0, RAM, 0, USER))

        assert errno.EFAULT == errno_of(memory.read, RAM, 1)
        assert b"kept" == memory.user.read(USER, 4)

    @pytest.mark.parametrize("code", [errno.EFAULT, errno.EINVAL])
    def test_beyond_the_address_width(self, code: int) -> None:
        """A slot must end within the guest's address width; arm64 says EFAULT, x86 EINVAL."""
        memory = GuestMemory(gpa_bits=40, gpa_errno=code)
        memory.set_region(Region(0, 0, (1 << 40) - PAGE, PAGE, USER))

        assert code == errno_of(memory.set_region, Region(1, 0, 1 << 40, PAGE, USER))

    @pytest.mark.spec("api.set-user-memory-region.EINVAL.flags")
    def test_a_host_without_read_only_slots(self) -> None:
        """KVM_MEM_READONLY is an unknown flag where KVM_CAP_READONLY_MEM is 0."""
        memory = GuestMemory(readonly=False)

        assert errno.EINVAL == errno_of(memory.set_region, Region(0, READONLY, 0, PAGE, USER))


class TestAccess:
    def test_a_terabyte_costs_what_it_touches(self) -> None:
        """Neither the slot nor reading it costs memory; two written pages cost two pages."""
        memory = GuestMemory()
        memory.add_ram(0, 1 << 40)
        memory.write_u64((1 << 40) - 8, 1)
        memory.write_u8(0, 1)

        assert 0 == memory.read_u64(1 << 39)
        assert isinstance(memory.user, SparseMemory)
        assert 2 * PAGE == memory.user.resident

    def test_values_are_little_endian(self, memory: GuestMemory) -> None:
        """The least significant byte comes first."""
        memory.write_u64(RAM, 0x0807060504030201)

        assert bytes(range(1, 9)) == memory.read(RAM, 8)
        assert (0x01, 0x0201, 0x04030201) == (
            memory.read_u8(RAM),
            memory.read_u16(RAM),
            memory.read_u32(RAM),
        )
        memory.write_u32(RAM, 0xA4A3A2A1)
        memory.write_u16(RAM, 0xB2B1)
        memory.write_u8(RAM, 0xC1)
        assert 0x08070605_A4A3B2C1 == memory.read_u64(RAM)

    def test_nothing_is_cached(self, memory: GuestMemory) -> None:
        """What the VMM writes to its own memory is what the guest reads next."""
        memory.read_u32(RAM)
        memory.user.write(USER, b"\x05\0\0\0")

        assert 5 == memory.read_u32(RAM)

    def test_across_slots(self, memory: GuestMemory) -> None:
        """Neighbouring slots are one memory to the guest, whatever lies behind them."""
        memory.add_ram(RAM - PAGE, PAGE)
        memory.write(RAM - 3, b"abcdef")

        assert b"abcdef" == memory.read(RAM - 3, 6)
        assert b"def" == memory.user.read(USER, 3)

    def test_nothing_is_written_outside(self, memory: GuestMemory) -> None:
        """A write that leaves the slots is EFAULT as a whole."""
        assert errno.EFAULT == errno_of(memory.write, RAM + 16 * PAGE - 2, b"\xff" * 4)
        assert b"\0\0" == memory.read(RAM + 16 * PAGE - 2, 2)

    def test_a_slot_without_user_memory(self) -> None:
        """A slot may be made of nothing; then the accesses are EFAULT."""
        memory = GuestMemory()
        memory.set_region(Region(0, 0, 0, PAGE, 0x1000))

        assert memory.is_backed(0)
        assert errno.EFAULT == errno_of(memory.read, 0, 1)

    def test_read_only_slots(self, memory: GuestMemory) -> None:
        """A read-only slot is read as any other; a write is refused and nothing of it is done."""
        memory.add_ram(RAM + 16 * PAGE, PAGE, flags=READONLY)
        end = RAM + 16 * PAGE

        assert bytes(4) == memory.read(end, 4)
        assert errno.EFAULT == errno_of(memory.write, end - 2, b"\xff" * 4)
        assert bytes(2) == memory.read(end - 2, 2)
        assert [True, False] == [memory.is_backed(end - 2, 4), memory.is_writable(end - 2, 4)]
        memory.read(end, 1)
        assert [True, False] == [memory.is_writable(RAM), memory.is_writable(end)]

    def test_own_pages_need_a_simulated_user_memory(self) -> None:
        """add_ram takes its pages from a SparseMemory."""

        class Elsewhere:
            def read(self, addr: int, n: int) -> bytes:
                return bytes(n)

            def write(self, addr: int, data: object) -> None: ...

        with pytest.raises(TypeError, match="must have a SparseMemory"):
            GuestMemory(Elsewhere()).add_ram(0, PAGE)


class TestDirtyLog:
    @pytest.mark.spec(
        "api.set-user-memory-region.rule.log", "api.get-dirty-log.rule.bits", "api.get-dirty-log.rule.clears"
    )
    def test_bits(self, memory: GuestMemory) -> None:
        """Bit n is page n, rounded up to 64 bits; fetching clears; reads do not count."""
        memory.set_region(Region(0, LOG, RAM, 16 * PAGE, USER))
        memory.write(RAM + 9 * PAGE - 1, b"two pages")
        memory.read(RAM, 16 * PAGE)

        assert b"\x00\x03\0\0\0\0\0\0" == memory.dirty_log(0)
        assert bytes(8) == memory.dirty_log(0)

    @pytest.mark.parametrize(
        ("offset", "n", "pages"),
        [(0, PAGE, [0]), (0, PAGE + 1, [0, 1]), (PAGE - 1, 1, [0]), (PAGE, 1, [1]), (1, 2 * PAGE, [0, 1, 2])],
    )
    def test_exactly_the_pages_written(self, memory: GuestMemory, offset: int, n: int, pages: list[int]) -> None:
        """A write marks the pages that hold its bytes and no other."""
        memory.set_region(Region(0, LOG, RAM, 16 * PAGE, USER))
        memory.write(RAM + offset, bytes(n))

        assert pages == memory.dirty_pages(0)

    def test_page_numbers(self, memory: GuestMemory) -> None:
        """The same log as numbers, for slots whose bitmap is megabytes of zeros."""
        memory.set_region(Region(0, LOG, RAM, 16 * PAGE, USER))
        for page in (9, 3, 3):
            memory.write_u8(RAM + page * PAGE, 1)

        assert [3, 9] == memory.dirty_pages(0)
        assert [] == memory.dirty_pages(0)

    @pytest.mark.spec("api.get-dirty-log.rule.first")
    def test_a_new_log_is_clear(self, memory: GuestMemory) -> None:
        """What was written before logging was switched on, or while it was off, is not in the log."""
        for flags in (LOG, 0, LOG):
            memory.write_u8(RAM, 1)
            memory.set_region(Region(0, flags, RAM, 16 * PAGE, USER))

        assert bytes(8) == memory.dirty_log(0)

    def test_a_log_survives_a_move(self, memory: GuestMemory) -> None:
        """Bits count pages of the slot, wherever it is."""
        memory.set_region(Region(0, LOG, RAM, 16 * PAGE, USER))
        memory.write_u8(RAM, 1)
        memory.set_region(Region(0, LOG, 0, 16 * PAGE, USER))

        assert [0] == memory.dirty_pages(0)

    @pytest.mark.spec("api.get-dirty-log.EINVAL.slot", "api.get-dirty-log.ENOENT.no-log")
    @pytest.mark.parametrize(
        ("slot", "code"),
        [(0, errno.ENOENT), (1, errno.ENOENT), (32767, errno.EINVAL), (1 << 16, errno.EINVAL)],
        ids=["log-off", "absent", "number", "address-space"],
    )
    def test_errors(self, memory: GuestMemory, slot: int, code: int) -> None:
        """A slot out of range is EINVAL, one without a log ENOENT."""
        assert code == errno_of(memory.dirty_log, slot)


class TestManualDirtyLog:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: fetching and clearing are two calls."""

    @pytest.fixture
    def memory(self) -> GuestMemory:
        """A slot of 100 pages whose log starts all set."""
        memory = GuestMemory()
        memory.log_options = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        memory.add_ram(0, 100 * PAGE, flags=LOG)
        return memory

    def test_a_log_may_start_all_set(self, memory: GuestMemory) -> None:
        """All pages are dirty, and no bit stands for a page there is not."""
        assert ((1 << 100) - 1).to_bytes(16, "little") == memory.dirty_log(0)
        assert list(range(100)) == memory.dirty_pages(0)

    def test_an_all_set_log_costs_what_was_cleared(self) -> None:
        """A terabyte of dirty pages is not a quarter of a billion numbers."""
        log = DirtyLog(1 << 28, all_dirty=True)
        log.clear([5])
        log.mark(3, 5)

        assert 0 == len(log._pages)

    def test_clearing(self, memory: GuestMemory) -> None:
        """What is cleared stays clear until it is written again; the rest stays dirty."""
        memory.clear_dirty_log(0, 64, 36, lambda n: b"\xff" * n)
        memory.clear_dirty_log(0, 0, 64, lambda n: b"\xfe" + b"\xff" * (n - 1))
        memory.write_u8(70 * PAGE, 1)

        assert [0, 70] == memory.dirty_pages(0)
        assert [0, 70] == memory.dirty_pages(0)

    @pytest.mark.parametrize(
        ("slot", "first", "pages", "code"),
        [
            pytest.param(0, 1, 63, errno.EINVAL, id="first-not-64"),
            pytest.param(0, 0, 63, errno.EINVAL, id="number-not-64"),
            pytest.param(0, 128, 0, errno.EINVAL, id="first-beyond"),
            pytest.param(0, 64, 37, errno.EINVAL, id="number-beyond"),
            pytest.param(1, 0, 64, errno.ENOENT, id="no-slot"),
            pytest.param(32767, 0, 64, errno.EINVAL, id="slot"),
        ],
    )
    def test_errors(self, memory: GuestMemory, slot: int, first: int, pages: int, code: int) -> None:
        """Pages are cleared in groups of 64 up to the slot's end; the bitmap is not looked at before."""
        fetched: list[int] = []

        def fetch(n: int) -> bytes:
            fetched.append(n)
            return bytes(n)

        assert code == errno_of(memory.clear_dirty_log, slot, first, pages, fetch)
        assert [] == fetched


PAGES = 12  # of guest memory in the model below, and of user memory


# Addresses around page boundaries and lengths of about whole pages are where mistakes hide.
ADDRESSES = st.builds(
    lambda page, near: max(0, page * PAGE + near), st.integers(0, 16), st.sampled_from([0, -1, 1, -8, 100])
)
LENGTHS = st.builds(lambda pages, more: pages * PAGE + more, st.integers(0, 2), st.sampled_from([0, 1, 2, 8]))


class MemoryMachine(RuleBasedStateMachine):
    """Guest memory against a dict of bytes and a dict of slots that are looked through from end to end."""

    @initialize()
    def start(self) -> None:
        self.user = SparseMemory()
        self.base = self.user.map(PAGES * PAGE)
        self.memory = GuestMemory(self.user, slots=4, gpa_bits=12 + 4)
        self.bytes: dict[int, int] = {}  # user address to value
        self.slots: dict[int, Region] = {}
        self.dirty: dict[int, set[int]] = {}
        self.set_region(slot=0, flags=LOG, gpa=2, size=4, user=0, like_before=False)

    def lookup(self, gpa: int) -> tuple[int, Region] | None:
        """The slot an address is in, and the user address behind it."""
        for region in self.slots.values():
            offset = gpa - region.guest_phys_addr
            if 0 <= offset < region.memory_size:
                return region.userspace_addr + offset, region
        return None

    def expected_errno(self, new: Region) -> int | None:
        old = self.slots.get(new.slot)
        if not new.memory_size:
            return errno.EINVAL if old is None else None
        if old is not None and (
            (old.memory_size, old.userspace_addr, old.flags & READONLY)
            != (new.memory_size, new.userspace_addr, new.flags & READONLY)
        ):
            return errno.EINVAL
        end = new.guest_phys_addr + new.memory_size
        for gpa in range(new.guest_phys_addr, end, PAGE):
            found = self.lookup(gpa)
            if found is not None and found[1].slot != new.slot:
                return errno.EEXIST
        return errno.EINVAL if end > 16 * PAGE else None

    @rule(
        slot=st.integers(0, 3),
        flags=st.sampled_from([0, 0, LOG, LOG, READONLY]),
        gpa=st.integers(0, 15),
        size=st.integers(0, 4),
        user=st.integers(0, PAGES - 4),
        like_before=st.booleans(),
    )
    def set_region(self, slot: int, flags: int, gpa: int, size: int, user: int, like_before: bool) -> None:
        region = Region(slot, flags, gpa * PAGE, size * PAGE, self.base + user * PAGE)
        old = self.slots.get(slot)
        if like_before and old is not None:
            region = Region(slot, flags, gpa * PAGE, old.memory_size, old.userspace_addr)
        expected = self.expected_errno(region)
        if expected is not None:
            assert expected == errno_of(self.memory.set_region, region)
            return
        self.memory.set_region(region)
        if not region.memory_size:
            del self.slots[slot]
        else:
            self.slots[slot] = region
        if not region.memory_size or not flags & LOG:
            self.dirty.pop(slot, None)
        else:
            self.dirty.setdefault(slot, set())

    @rule(gpa=ADDRESSES, n=LENGTHS, value=st.integers(0, 255))
    def write(self, gpa: int, n: int, value: int) -> None:
        data = bytes([value]) * n
        places = [self.lookup(gpa + i) for i in range(len(data))]
        if any(place is None or place[1].flags & READONLY for place in places):
            assert errno.EFAULT == errno_of(self.memory.write, gpa, data)
            assert not data or not self.memory.is_writable(gpa, len(data))
            return
        self.memory.write(gpa, data)
        for i, place in enumerate(places):
            assert place is not None
            addr, region = place
            self.bytes[addr] = data[i]
            if region.flags & LOG:
                self.dirty[region.slot].add((gpa + i - region.guest_phys_addr) // PAGE)

    @rule(gpa=ADDRESSES, n=LENGTHS)
    def read(self, gpa: int, n: int) -> None:
        places = [self.lookup(gpa + i) for i in range(n)]
        backed = all(places)
        assert not n or backed == self.memory.is_backed(gpa, n)
        if backed:
            assert bytes(self.bytes.get(p[0], 0) for p in places if p) == self.memory.read(gpa, n)
        else:
            assert errno.EFAULT == errno_of(self.memory.read, gpa, n)

    @rule(offset=st.integers(0, PAGES * PAGE - 8), data=st.binary(max_size=8))
    def vmm_writes(self, offset: int, data: bytes) -> None:
        self.user.write(self.base + offset, data)
        self.bytes.update({self.base + offset + i: value for i, value in enumerate(data)})

    @rule(slot=st.integers(0, 3))
    def dirty_log(self, slot: int) -> None:
        pages = self.dirty.get(slot)
        if pages is None:
            assert errno.ENOENT == errno_of(self.memory.dirty_log, slot)
            return
        assert sum(1 << page for page in pages).to_bytes(8, "little") == self.memory.dirty_log(slot)
        pages.clear()

    @invariant()
    def check(self) -> None:
        self.memory._check()
        assert sorted(r.guest_phys_addr for r in self.slots.values()) == [s.base for s in self.memory]


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


class Device:
    """A handler that is told apart by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def mmio_read(self, offset: int, size: int, vcpu: Any) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int, vcpu: Any) -> None: ...


class TestAddressSpace:
    def test_find(self) -> None:
        """An access finds the range that holds all of it, and the offset in it."""
        space, device = AddressSpace("mmio"), Device("gic")
        space.add(0x1000, 0x100, device)

        assert (device, 0) == space.find(0x1000)
        assert (device, 0xFC) == space.find(0x10FC, 4)
        assert [None, None, None] == [space.find(0xFFF, 4), space.find(0x10FD, 4), space.find(0x1100)]

    @pytest.mark.parametrize(("base", "size"), [(0xFFF, 2), (0x1000, 0x100), (0x10FF, 1), (0, 0x2000)])
    def test_overlap_is_refused(self, base: int, size: int) -> None:
        """Two ranges may not share an address."""
        space = AddressSpace("mmio")
        space.add(0x1000, 0x100, Device("first"))
        space.add(0x1100, 0x100, Device("neighbour"))
        with pytest.raises(ValueError, match=r"a range of mmio must be free, .* overlaps the one at 0x1000"):
            space.add(base, size, Device("second"))

    @pytest.mark.parametrize(("base", "size"), [(0, 0), (-1, 4), ((1 << 64) - 1, 2)])
    def test_bad_ranges_are_refused(self, base: int, size: int) -> None:
        """A range has addresses, and they have 64 bits."""
        with pytest.raises(ValueError, match="a range of pio must be within 64 bits"):
            AddressSpace("pio").add(base, size, Device("x"))

    @pytest.mark.parametrize("later", [0, 1])
    @pytest.mark.parametrize(
        ("ranges", "addr"),
        [
            pytest.param(((0x1000, 0x200), (0x1100, 0x200)), 0x1180, id="begins-lower"),
            pytest.param(((0x1000, 0x100), (0x1000, 0x200)), 0x1080, id="shorter"),
        ],
    )
    def test_which_of_two_answers(self, ranges: tuple[tuple[int, int], ...], addr: int, later: int) -> None:
        """As on KVM's bus the one that begins lower, or with one base the shorter, whichever came first."""
        space, devices = AddressSpace("mmio"), [Device("first"), Device("second")]
        for n in (1 - later, later):
            space.add(*ranges[n], devices[n], shadow=True)

        assert (devices[0], addr - 0x1000) == space.find(addr)

    def test_the_earlier_range_shadows_the_later(self) -> None:
        """A range within another is answered by the one registered first; what it gives up comes to light."""
        space, first, second = AddressSpace("mmio"), Device("first"), Device("second")
        space.add(0x1000, 0x100, first)
        space.add(0x0F00, 0x300, second, shadow=True)

        assert [(second, 0xFF), (first, 0), (second, 0x200)] == [space.find(addr) for addr in (0xFFF, 0x1000, 0x1100)]
        assert space.find(0xFFE, 4) is None
        space.remove(0x1000, first)
        assert (second, 0xFE) == space.find(0xFFE, 4)

    def test_removing_what_is_not_there(self) -> None:
        """A range is named by its base and its handler."""
        space, device = AddressSpace("mmio"), Device("gic")
        space.add(0x1000, 0x100, device)
        with pytest.raises(ValueError, match="mmio must have a range of gic at 0x1001"):
            space.remove(0x1001, device)
        with pytest.raises(ValueError, match="mmio must have a range of other at 0x1000"):
            space.remove(0x1000, Device("other"))

    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.booleans()), max_size=14))
    def test_behaves_as_a_list_searched_from_the_front(self, steps: list[tuple[int, int, bool, bool]]) -> None:
        """Whatever is added and removed, each address is answered by the first range that has it."""
        space = AddressSpace("mmio")
        model: list[tuple[int, int, Device]] = []
        for number, (base, size, shadow, remove) in enumerate(steps):
            if remove and model:
                start, _, device = model.pop(base % len(model))
                space.remove(start, device)
            else:
                device = Device(f"device {number}")
                free = not any(base < b + s and b < base + size for b, s, _ in model)
                if free or shadow:
                    space.add(base, size, device, shadow=shadow)
                    behind = (n for n, (b, s, _) in enumerate(model) if b >= base and b + s > base + size)
                    model.insert(next(behind, len(model)), (base, size, device))
                else:
                    with pytest.raises(ValueError, match="must be free"):
                        space.add(base, size, device)
            for addr in range(54):
                expected = next(((d, addr - b) for b, s, d in model if b <= addr < b + s), None)
                assert expected == space.find(addr)
