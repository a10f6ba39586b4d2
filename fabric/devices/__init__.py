"""Device models: the interrupt controllers and other KVM devices, one module a device.

They are synchronous Python and see their machine through the protocols of :mod:`fabric.devices.base`. Their
registers are tables of :mod:`fabric.devices.registers`, their attributes tables of
:mod:`fabric.devices.attributes`. :mod:`fabric.devices.registry` says which device type a host offers.
"""
