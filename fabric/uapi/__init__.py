"""Numbers and struct layouts of the KVM interface, and the user memory its pointers go into.

``ioctl`` has the request numbers, ``kvm`` what all architectures share, ``arm64`` (and its siblings) what one
architecture adds, ``codec`` the declarations they are written in, ``usermem`` the memory behind pointers.
"""
