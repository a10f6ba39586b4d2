"""Whatever is asked of the KVM layer, it answers with a value or an errno, and the ledger adds up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvm_machine import DOORBELL, GICD, GICR, GITS, RAM, Arm, outcome

from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

REQUESTS = sorted(requests.REQUEST_NAMES)
INTERESTING = [
    0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 27, 30, 31, 32, 64, 255, 256, 1019, 1020, 4095, 4096, 8192, 0xFFFF, 0x1_0000,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63), (1 << 64) - 1,
    RAM, GICD, GICR, GITS, DOORBELL,
]  # fmt: skip
numbers = st.one_of(st.sampled_from(INTERESTING), st.integers(0, (1 << 64) - 1))


def members(struct: type[Any], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """A struct whose integer members have interesting or any values, cut to their size."""

    def build(data: bytes, values: list[int], chosen: dict[str, int]) -> bytes:
        raw = bytearray(data.ljust(struct.SIZE, b"\0")[: struct.SIZE])
        for (_, offset), value in zip(struct.OFFSETS.items(), values, strict=False):
            width = min(8 if offset % 8 == 0 else 4, struct.SIZE - offset)
            raw[offset : offset + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        for name, value in chosen.items():
            offset = struct.OFFSETS[name]
            raw[offset : offset + 4] = (value & 0xFFFF_FFFF).to_bytes(4, "little")
        return bytes(raw)

    count = len(struct.OFFSETS)
    return st.builds(
        build, st.binary(max_size=struct.SIZE), st.lists(numbers, max_size=count), st.fixed_dictionaries(fixed)
    )


STRUCTS = st.one_of(
    members(uapi.KvmDeviceAttr, group=st.integers(0, 9)),
    members(uapi.KvmCreateDevice, type=st.integers(0, 11)),
    members(uapi.KvmMsi),
    members(uapi.KvmIrqLevel),
    members(uapi.KvmIrqfd, fd=st.integers(0, 12), flags=st.integers(0, 3)),
    members(uapi.KvmIoeventfd, len=st.sampled_from([0, 1, 2, 4, 8]), flags=st.integers(0, 15)),
    members(uapi.KvmUserspaceMemoryRegion),
    members(uapi.KvmOneReg),
    members(arm.KvmVcpuInit, target=st.just(5)),
    st.binary(max_size=120),
)


@pytest.mark.parametrize("set_up", ["bare", "ready"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_call_answers(set_up: str, data: st.DataObject) -> None:
    """A sequence of calls with any request, fd and argument raises nothing but OSError with an errno."""
    machine = Arm(2, gic=set_up == "ready", memory=True)
    if set_up == "ready":
        machine.add_its()
        machine.forward()
    kvm = machine.kvm
    values = machine.host.values.addr
    events = [kvm.eventfd() for _ in range(3)]
    fds = [machine.host.fd, machine.vm.fd, *(vcpu.fd for vcpu in machine.vcpus)]
    fds += [machine.gic.fd, machine.its.fd] if set_up == "ready" else []
    for _ in range(data.draw(st.integers(1, 12))):
        fd = data.draw(st.sampled_from(fds))
        request = data.draw(st.sampled_from(REQUESTS))
        argument: Any = data.draw(st.one_of(numbers, STRUCTS, st.just(values)))
        if isinstance(argument, bytes):
            argument = bytearray(argument)
            for offset in (0, 20):  # name an eventfd, or a place in user memory, now and then
                if len(argument) >= offset + 4 and argument[offset] < len(events):
                    argument[offset : offset + 4] = int(events[argument[offset]]).to_bytes(4, "little")
            if len(argument) == uapi.KvmDeviceAttr.SIZE and data.draw(st.booleans()):
                argument[16:24] = values.to_bytes(8, "little")
        machine.user.write(values, data.draw(st.binary(min_size=16, max_size=16)))
        result = outcome(kvm.ioctl, fd, request, argument)
        if isinstance(result, str):
            continue
        if request in (requests.KVM_CREATE_VM, requests.KVM_CREATE_VCPU):
            fds.append(result)
        for event in events:
            event.signal()
    kvm.check()
    for fd in fds:
        kvm.close(fd)
    kvm.check()
