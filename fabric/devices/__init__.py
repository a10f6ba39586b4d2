"""Device models: the interrupt controllers and other KVM devices, one module a device.

They are synchronous Python that see their machine through the protocols of :mod:`fabric.devices.base`, declare
their registers as tables of :mod:`fabric.devices.registers` and their attributes as tables of
:mod:`fabric.devices.attributes`. :mod:`fabric.devices.registry` says which device type a host offers.
"""
