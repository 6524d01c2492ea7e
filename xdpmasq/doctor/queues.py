"""Is the work of a network card shared out among CPUs?"""

import os
from collections.abc import Iterator
from pathlib import Path

from xdpmasq.doctor import reading
from xdpmasq.doctor.finding import Finding
from xdpmasq.doctor.host import Host

NET, IRQ = Path("/sys/class/net"), Path("/proc/irq")


def check_queues(host: Host) -> Iterator[Finding]:
    cpus = os.cpu_count() or 1
    for link in host.devices():
        queues = len(list((NET / link.name / "queues").glob("rx-*")))
        if link.kind or not queues or cpus == 1:  # only hardware has interrupts
            continue
        served = _served_by(link.name)
        if queues == 1:
            message = f"{link.name} has one receive queue: one CPU of {cpus} does all for what comes in there"
            yield Finding("queues", "warn", message, f"ethtool -L {link.name} combined {cpus}, if it can have more")
        elif len(served) == 1 and "".join(served).isdigit():
            message = f"all {queues} queues of {link.name} interrupt the same CPU, {''.join(served)}"
            yield Finding("queues", "warn", message, "start irqbalance, or write to smp_affinity_list of each")
        else:
            yield Finding("queues", "ok", f"{link.name} has {queues} receive queues for {cpus} CPUs")


def _served_by(name: str) -> set[str]:
    """The CPUs, as lists, to which the interrupts of a card go; virtio's belong to the PCI device above."""
    device = (NET / name / "device").resolve()
    numbers = [each.name for where in (device, device.parent) for each in where.glob("msi_irqs/*")]
    found = (reading.text_of(str(IRQ / number / "effective_affinity_list")).strip() for number in numbers)
    return {each for each in found if each}


CHECKS = (check_queues,)
