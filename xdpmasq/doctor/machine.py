"""Can this machine run programs at all: privileges, kernel, bcc?"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

from xdpmasq import attachment, bpf, checks, kernel
from xdpmasq.doctor import reading
from xdpmasq.doctor.finding import Finding
from xdpmasq.doctor.host import Host
from xdpmasq.errors import HostError
from xdpmasq.net import sysctl

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # the latter to find programs and maps by their ids


def check_privileges(host: Host) -> Iterator[Finding]:
    status = dict(line.split(":\t", 1) for line in reading.text_of("/proc/self/status").splitlines() if ":\t" in line)
    effective = int(status.get("CapEff", "0"), 16)
    lacking = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        message = f"may not load and attach programs, without {' and '.join(lacking)}"
        yield Finding("privileges", "block", message, "run it as root, in a container with these capabilities")
    elif why := bpf.refusal():
        message = f"the kernel refuses bpf(2): {why}"
        yield Finding("privileges", "block", message, "in a container its seccomp filter has to let bpf(2) pass")
    else:
        yield Finding("privileges", "ok", "may load programs and attach them")


def check_kernel(host: Host) -> Iterator[Finding]:
    release = os.uname().release
    if kernel.release() < checks.OLDEST_KERNEL:
        needed = ".".join(map(str, checks.OLDEST_KERNEL))
        why = "nobody has tried whether its verifier follows the programs"
        yield Finding("kernel", "block", f"Linux {release} is too old: {why}", f"use {needed} or later")
    else:
        yield Finding("kernel", "ok", f"Linux {release}; tested on {checks.TESTED}")


def check_tc(host: Host) -> Iterator[Finding]:
    with contextlib.suppress(OSError, HostError):  # no privileges, no bpf(2): other checks say so
        if attachment.uses_tcx():
            yield Finding("tc", "ok", "TC programs go on TCX")
        else:
            yield Finding("tc", "ok", "TC programs go on clsact; TCX, from Linux 6.6 on, would cost less")


def check_jit(host: Host) -> Iterator[Finding]:
    # the sysctl exists in the first network namespace only
    value = sysctl.read("net.core.bpf_jit_enable")
    if value == "0":
        message = "the BPF JIT is off: programs are interpreted, several times slower"
        yield Finding("jit", "warn", message, "sysctl -w net.core.bpf_jit_enable=1")
    else:
        yield Finding("jit", "ok", "the BPF JIT is on" if value else "the BPF JIT cannot be seen from here")


def check_btf(host: Host) -> Iterator[Finding]:
    if Path("/sys/kernel/btf/vmlinux").exists():
        yield Finding("btf", "ok", "the kernel has BTF")
    else:
        message = "the kernel has no BTF: xdpmasq works, bpftool shows maps without names of fields"
        yield Finding("btf", "warn", message, "use a kernel built with CONFIG_DEBUG_INFO_BTF")


def check_bpffs(host: Host) -> Iterator[Finding]:
    mounted = any(line.split()[2] == "bpf" for line in reading.text_of("/proc/self/mounts").splitlines())
    yield Finding("bpffs", "ok", f"bpffs is {'' if mounted else 'not '}mounted; xdpmasq does not need it")


def check_bcc(host: Host) -> Iterator[Finding]:
    install = "apt install python3-bpfcc (Fedora: python3-bcc), for the system's Python"
    try:
        bcc = importlib.import_module("bcc")
    except ImportError as error:
        yield Finding("bcc", "block", f"bcc cannot be imported: {error}", install)
        return
    if not hasattr(bcc, "BPF"):
        message = f"{bcc.__file__} is another package of the name bcc (PyPI's)"
        yield Finding("bcc", "block", message, f"pip uninstall bcc; {install}")
    else:
        yield Finding("bcc", "ok", f"bcc {getattr(bcc, '__version__', '(no version)')}")


def check_headers(host: Host) -> Iterator[Finding]:
    if Path("/usr/include/linux/bpf.h").exists():
        yield Finding("headers", "ok", "the user-space kernel headers are there; no others are needed")
    else:
        message = "/usr/include/linux/bpf.h is missing: programs cannot be compiled"
        yield Finding("headers", "block", message, "apt install linux-libc-dev")


CHECKS = (check_privileges, check_kernel, check_tc, check_jit, check_btf, check_bpffs, check_bcc, check_headers)
