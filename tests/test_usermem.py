"""User memory: what is there can be used, what is not is EFAULT."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import KvmError
from fabric.uapi.usermem import BufferPointer, ProcessMemory, SparseMemory, UserMemory, UserPointer

PAGE = 4096


def fails_with_efault(memory: UserMemory, addr: int, n: int) -> None:
    with pytest.raises(KvmError) as read:
        memory.read(addr, n)
    with pytest.raises(KvmError) as written:
        memory.write(addr, bytes(n))

    assert (errno.EFAULT, errno.EFAULT) == (read.value.errno, written.value.errno)


class Mapping:
    """Three pages of this process of which the last is not accessible."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, 3 * PAGE)
        self.addr = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.addr + 2 * PAGE), PAGE, 0) == 0


@pytest.fixture(scope="module")
def mapping() -> Mapping:
    return Mapping()


def forbidden(*args: object) -> int:
    """process_vm_readv under a policy that does not let it through."""
    ctypes.set_errno(errno.EPERM)
    return -1


@pytest.fixture(params=["process_vm", "proc_self_mem"])
def process(request: pytest.FixtureRequest) -> ProcessMemory:
    """The process memory, as it works here and as it works where process_vm_readv is forbidden."""
    memory = ProcessMemory()
    if request.param == "proc_self_mem":
        memory._readv = memory._writev = forbidden
    return memory


class TestProcessMemory:
    @pytest.mark.parametrize("n", [1, 8, PAGE, PAGE + 1])
    def test_reads_and_writes_this_process(self, process: ProcessMemory, mapping: Mapping, n: int) -> None:
        """A write is seen in the mapping at once, and a read sees what is there now."""
        data = os.urandom(n)
        process.write(mapping.addr + 3, data)

        assert data == mapping.map[3 : 3 + n]
        mapping.map[3:4] = b"!"
        assert b"!" + data[1:] == process.read(mapping.addr + 3, n)

    @pytest.mark.parametrize("addr", [0, 1 << 47, 1 << 63, (1 << 64) - 8, (1 << 64) - 4, -8])
    def test_nothing_there(self, process: ProcessMemory, addr: int) -> None:
        """A pointer to nothing is EFAULT, also at the end of the address space and beyond."""
        fails_with_efault(process, addr, 8)

    def test_addresses_have_64_bits(self, process: ProcessMemory, mapping: Mapping) -> None:
        """The upper bits of a longer number are not cut off to make it a good address."""
        fails_with_efault(process, (1 << 64) + mapping.addr, 8)

    def test_partly_there(self, mapping: Mapping) -> None:
        """A range that runs into an inaccessible page is EFAULT as a whole."""
        memory = ProcessMemory()

        fails_with_efault(memory, mapping.addr + 2 * PAGE - 4, 8)
        assert bytes(4) == memory.read(mapping.addr + 2 * PAGE - 4, 4)

    def test_the_refused_call_is_not_tried_again(self, mapping: Mapping) -> None:
        """A policy does not change, so the first EPERM decides for good."""
        memory = ProcessMemory()
        calls = []

        def counted(*args: object) -> int:
            calls.append(args)
            return forbidden()

        memory._readv = counted
        for _ in range(3):
            memory.read(mapping.addr, 1)

        assert 1 == len(calls)

    def test_nothing_is_always_there(self) -> None:
        """Copying no bytes succeeds wherever the pointer points."""
        memory = ProcessMemory()
        memory.write(0, b"")

        assert b"" == memory.read(0, 0)

    def test_threads_do_not_disturb_each_other(self, mapping: Mapping) -> None:
        """Each thread has its own bounce buffer."""
        memory = ProcessMemory()
        wrong: list[int] = []

        def work(number: int) -> None:
            addr, data = mapping.addr + 64 * number, bytes([number]) * 64
            for _ in range(300):
                memory.write(addr, data)
                if memory.read(addr, 64) != data:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert [] == wrong


class TestSparseMemory:
    def test_a_mapping_reads_as_zero_and_costs_what_is_written(self) -> None:
        """A terabyte costs nothing, reading it neither; a written byte costs its page."""
        memory = SparseMemory()
        addr = memory.map(1 << 40)

        assert bytes(16) == memory.read(addr + (1 << 39), 16)
        assert 0 == memory.resident
        memory.write(addr + (1 << 40) - 1, b"x")
        assert PAGE == memory.resident

    def test_mappings_are_apart(self) -> None:
        """There is a guard page between any two mappings, so running off one is noticed."""
        memory = SparseMemory()
        first, second = memory.map(PAGE), memory.map(1)

        assert first + 2 * PAGE <= second
        fails_with_efault(memory, first + PAGE - 4, 8)
        fails_with_efault(memory, second - 1, 1)

    def test_nothing_is_written_when_a_part_is_missing(self) -> None:
        """The range is checked before the first byte is stored."""
        memory = SparseMemory()
        addr = memory.map(PAGE)
        with pytest.raises(KvmError):
            memory.write(addr + PAGE - 4, b"\xff" * 8)

        assert bytes(4) == memory.read(addr + PAGE - 4, 4)

    @pytest.mark.parametrize("pages", [3, 1 << 20])
    def test_unmap(self, pages: int) -> None:
        """What was unmapped is EFAULT and its memory is given back."""
        memory = SparseMemory()
        kept, addr = memory.map(PAGE), memory.map(pages * PAGE)
        for at in (kept, addr, addr + PAGE):
            memory.write(at, b"x")
        memory.unmap(addr)

        fails_with_efault(memory, addr, 1)
        assert b"x" == memory.read(kept, 1)
        assert PAGE == memory.resident

    def test_misuse(self) -> None:
        """Lengths are positive, and only what was mapped is unmapped."""
        memory = SparseMemory()
        with pytest.raises(ValueError, match="length must be positive, not 0"):
            memory.map(0)
        with pytest.raises(ValueError, match="addr must be what map"):
            memory.unmap(PAGE)

    @given(st.lists(st.tuples(st.integers(-PAGE, 4 * PAGE), st.binary(max_size=2 * PAGE + 2)), min_size=1, max_size=20))
    def test_behaves_as_an_array(self, writes: list[tuple[int, bytes]]) -> None:
        """Any sequence of writes leaves the bytes an array would have; what does not fit inside is EFAULT."""
        memory = SparseMemory()
        addr, model = memory.map(3 * PAGE), bytearray(3 * PAGE)
        for offset, data in writes:
            if not data or (0 <= offset and offset + len(data) <= len(model)):
                memory.write(addr + offset, data)
                model[offset : offset + len(data)] = data
            else:
                fails_with_efault(memory, addr + offset, len(data))

        assert bytes(model) == memory.read(addr, len(model))

    @pytest.mark.parametrize("touched", [3, 3_000])
    def test_the_pages_that_were_written_to(self, touched: int) -> None:
        """In order, within the range asked for; few pages in a large range or many in a small one."""
        memory = SparseMemory()
        addr = memory.map(1 << 32)
        pages = [addr + 5 * PAGE * n for n in range(touched)]
        for page in reversed(pages):
            memory.write(page + 7, b"x")

        assert pages == memory.written(addr, 1 << 32)
        assert pages[1:3] == memory.written(addr + PAGE, 13 * PAGE)
        assert pages[:2] == memory.written(addr, 6 * PAGE)
        assert [] == memory.written(addr + PAGE, 4 * PAGE)


class TestPointers:
    def test_a_buffer_ends_where_it_ends(self) -> None:
        """Touching a byte past a buffer's end is EFAULT, and nothing of the access is done."""
        buffer = bytearray(6)
        pointer = BufferPointer(buffer)
        with pytest.raises(KvmError) as read:
            pointer.u64()
        with pytest.raises(KvmError) as written:
            pointer.put_u32(1, offset=4)

        assert (errno.EFAULT, errno.EFAULT) == (read.value.errno, written.value.errno)
        assert bytes(6) == buffer
        assert bytes(6) == pointer.read(6)

    def test_a_buffer_is_updated_in_place(self) -> None:
        """Also one of wider elements than bytes."""
        buffer = (ctypes.c_uint64 * 2)()
        BufferPointer(buffer).put_u64(7, offset=8)

        assert [0, 7] == list(buffer)

    def test_a_read_only_buffer_is_refused(self) -> None:
        """The kernel may have to write to its argument."""
        with pytest.raises(TypeError, match="buffer must be writable"):
            BufferPointer(b"12345678")

    def test_a_user_pointer_goes_to_its_memory(self) -> None:
        """Offsets are from the address; values are in the host's byte order and cut to their width."""
        memory = SparseMemory()
        pointer = UserPointer(memory, memory.map(PAGE))
        pointer.put_u64(-2)
        pointer.put_u32(-1 << 32 | 5, offset=8)

        assert (1 << 64) - 2 == pointer.u64()
        assert 5 == pointer.u32(offset=8)
        assert bytes(memory.read(pointer.addr, 12)) == pointer.read(12)
