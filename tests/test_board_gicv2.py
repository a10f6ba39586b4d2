"""The board arm64-gicv2: its GICv2m frame, its driver, and what its CPU interface costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import fabric
from fabric.guest.driver import Vector
from fabric.guest.gicv2 import (
    GICD_ICFGR,
    GICD_IPRIORITYR,
    GICD_ISENABLER,
    GICD_ITARGETSR,
    MSI_SETSPI_NS,
    MSI_TYPER,
    Gicv2Driver,
    Gicv2Layout,
)
from fabric.guest.pci import write_msix
from fabric.trace.ledger import LedgerStatement
from fabric.vcpu import Costs
from fabric.vmm import Arm64Gicv2, Device
from fabric.vmm.arm64_gicv2 import FIRST_MSI_SPI, GICC_BASE, GICD_BASE, MSI_FRAME_BASE, NR_IRQS

Body = Callable[[Arm64Gicv2, Any, Any], Awaitable[object]]


def ledger_of(body: Body, vcpus: int = 1) -> LedgerStatement:
    """Run ``body(machine, cpu, driver)`` as a guest."""

    async def main() -> LedgerStatement:
        machine = Arm64Gicv2(vcpus)
        await machine.run_guest(lambda cpu, driver: body(machine, cpu, driver))
        statement: LedgerStatement = machine.kvm.statement()
        return statement

    return fabric.run(main)


async def nothing(cpu: Any) -> None:
    """A handler."""


# The GICv2m frame


def test_the_frame_says_which_spis_are_its() -> None:
    """MSI_TYPER: the first in bits 25:16, how many in bits 9:0; its other registers read zero."""

    async def body(machine: Arm64Gicv2, cpu: Any, driver: Any) -> None:
        assert 64 << 16 | 928 == await cpu.load(MSI_FRAME_BASE + MSI_TYPER, 4)
        assert 0 == await cpu.load(MSI_FRAME_BASE + MSI_SETSPI_NS, 4)
        assert 0 == await cpu.load(MSI_FRAME_BASE + 0xFCC, 4)

    ledger_of(body)


def test_a_message_raises_the_spi_it_names() -> None:
    """From a device it takes an irqfd, from a CPU an exit to the VMM."""
    seen: list[int] = []

    async def body(machine: Arm64Gicv2, cpu: Any, driver: Any) -> None:
        async def taken(cpu: Any) -> None:
            seen.append(cpu.number)

        device = machine.add_device(Device("d", vectors=2))
        vectors = [Vector(0, taken, "a"), Vector(1, taken, "b")]
        messages = await driver.allocate_msi(cpu, device.devid, vectors)
        await write_msix(cpu, device.bar, messages)
        device.raise_vector(1)
        await cpu.compute(1000)
        await cpu.store(messages[0].address, 4, messages[0].data)
        await cpu.compute(1000)
        assert ["a", "b"] == [driver.label(message.data) for message in messages]

    assert LedgerStatement(raised=2, delivered=2) == ledger_of(body, 2)
    assert [1, 0] == seen


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(MSI_SETSPI_NS, FIRST_MSI_SPI - 1, id="an SPI below"),
        pytest.param(MSI_SETSPI_NS, NR_IRQS, id="an SPI above"),
        pytest.param(MSI_SETSPI_NS + 4, FIRST_MSI_SPI, id="another register"),
    ],
)
def test_other_messages_reach_nobody(offset: int, value: int) -> None:
    """Neither from a CPU nor from a device, which counts them."""

    async def body(machine: Arm64Gicv2, cpu: Any, driver: Any) -> None:
        device = machine.add_device(Device("d", vectors=1))
        (message,) = await driver.allocate_msi(cpu, device.devid, [Vector(0, nothing, "a")])
        await cpu.store(MSI_FRAME_BASE + offset, 4, value)
        wrong = type(message)(MSI_FRAME_BASE + offset, value, device.devid)
        await write_msix(cpu, device.bar, [wrong])
        device.raise_vector(0)
        assert 1 == device.spurned

    assert LedgerStatement() == ledger_of(body)


# The driver


def test_a_vector_is_an_edge_with_priority_and_target() -> None:
    """As the guest reads them back from the distributor."""

    async def body(machine: Arm64Gicv2, cpu: Any, driver: Any) -> None:
        messages = await driver.allocate_msi(cpu, 8, [Vector(0, nothing, "a"), Vector(1, nothing, "b", 0x40)])
        first, second = (message.data for message in messages)
        assert (FIRST_MSI_SPI, FIRST_MSI_SPI + 1) == (first, second)
        assert 0b1010 == await cpu.load(GICD_BASE + GICD_ICFGR + first // 4, 4) & 0b1111
        assert (0xA0, 0x40) == tuple([await cpu.load(GICD_BASE + GICD_IPRIORITYR + spi, 1) for spi in (first, second)])
        assert (0b01, 0b10) == tuple([await cpu.load(GICD_BASE + GICD_ITARGETSR + spi, 1) for spi in (first, second)])
        assert 0b11 == await cpu.load(GICD_BASE + GICD_ISENABLER + first // 8, 4)

    ledger_of(body, 2)


def test_the_spis_of_the_frame_come_to_an_end() -> None:
    """All 928 can be given out; more are refused, and none is lost by it."""

    async def body(machine: Arm64Gicv2, cpu: Any, driver: Any) -> None:
        vectors = [Vector(0, nothing, "a")] * 927
        assert 990 == (await driver.allocate_msi(cpu, 8, vectors))[-1].data
        with pytest.raises(RuntimeError, match="device 0x10 needs 2 SPIs of the GICv2m frame, and 1 are left"):
            await driver.allocate_msi(cpu, 16, vectors[:2])
        assert [991] == [message.data for message in await driver.allocate_msi(cpu, 24, vectors[:1])]

    ledger_of(body)


def test_without_a_frame_there_are_no_messages() -> None:
    """The rest works: timers, IPIs."""

    async def body(machine: Arm64Gicv2, cpu: Any, _: Any) -> None:
        driver = Gicv2Driver(Gicv2Layout(GICD_BASE, GICC_BASE, None), 1)
        await driver.start(cpu)
        await driver.start_cpu(cpu)
        with pytest.raises(RuntimeError, match="no GICv2m frame, so no MSIs"):
            await driver.allocate_msi(cpu, 8, [Vector(0, nothing, "a")])
        driver.on_ipi(nothing)
        await driver.send_ipi(cpu, 0)
        await cpu.compute(1)

    assert LedgerStatement(raised=1, delivered=1) == ledger_of(body)


def test_ipis_of_several_senders_do_not_merge() -> None:
    """A GICv2 keeps an SGI pending for each CPU that sent it, and is told at the end whose it was."""
    seen: list[int] = []

    async def body(machine: Arm64Gicv2, cpu: Any, driver: Any) -> None:
        async def taken(cpu: Any) -> None:
            seen.append(cpu.number)

        async def relay(cpu: Any) -> None:
            await driver.send_ipi(cpu, 0, 1)

        driver.on_ipi(taken, 1)
        driver.on_ipi(relay, 2)
        cpu.mask()
        for sender in (1, 2, 1):
            await driver.send_ipi(cpu, sender, 2)
            await cpu.compute(1000)
        assert [] == seen
        cpu.unmask()
        await cpu.compute(1000)

    # Three that are relayed, and of the three that come back two have the same sender.
    assert LedgerStatement(raised=6, delivered=5, coalesced=1) == ledger_of(body, 3)
    assert [0, 0] == seen


# What it costs


def test_the_cpu_interface_costs_no_exit() -> None:
    """Acknowledge and end take no exit, as the hardware answers them; the distributor does."""
    seen: list[int] = []

    async def body(machine: Arm64Gicv2, cpu: Any, driver: Any) -> None:
        began = cpu.now
        await cpu.load(GICC_BASE + 4, 4)
        seen.append(cpu.now - began)
        await cpu.load(GICD_BASE, 4)
        seen.append(cpu.now - began)
        await cpu.store(GICC_BASE + 0x10, 4, 1023)
        await cpu.compute(0)
        seen.append(cpu.now - began)

    async def main() -> None:
        machine = Arm64Gicv2(1)
        machine.vcpus[0].costs = Costs(exit_ns=700, eoi_ns=16)
        await machine.run_guest(lambda cpu, driver: body(machine, cpu, driver))

    fabric.run(main)
    assert [0, 700, 716] == seen
