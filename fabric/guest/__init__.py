"""What runs on the vCPUs: interrupt-controller drivers, and workloads written on top of them.

Everything here uses what a guest can use: registers, memory, hypercalls. A driver has the shape of
:class:`fabric.guest.driver.InterruptDriver`, so that a workload runs unchanged on every board.
"""
