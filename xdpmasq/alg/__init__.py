"""ALGs: protocols that carry addresses (RFC 2663 section 2.9), one file each. See :mod:`xdpmasq.alg.api`."""
