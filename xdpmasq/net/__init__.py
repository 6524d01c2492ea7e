"""What the kernel knows of this network namespace: a module for each thing, the only importers of pyroute2.

Every call opens its own netlink socket in the namespace of the calling process and closes it, so nothing here keeps
state and `ip netns exec` works. Failures come out as :mod:`xdpmasq.errors`.
"""
