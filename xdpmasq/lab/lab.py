"""The lab itself: builds a topology out of namespaces, runs programs in it, and clears it away."""

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from xdpmasq import presence
from xdpmasq.lab import netns
from xdpmasq.lab.capture import Capture
from xdpmasq.lab.errors import LabError, wait_until
from xdpmasq.lab.relay import READY
from xdpmasq.lab.topology import ROLES, Topology

_SAFE_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
_NO_IPV6 = {"net/ipv6/conf/all/disable_ipv6": 1, "net/ipv6/conf/default/disable_ipv6": 1}
_NO_FOREIGN_SOURCES = {"net/ipv4/conf/eth0/rp_filter": 1}
_PROXY_ARP = {"net/ipv4/conf/eth0/proxy_arp": 1, "net/ipv4/neigh/eth0/proxy_delay": 0}


class Lab:
    """The network of `topology.py`, as a context manager or by :meth:`up` and :meth:`down`.

    masq-gate is left as a fresh machine: it does not forward until something makes it.

    Args:
        prefix: namespaces are called ``{prefix}-{role}``; labs with different prefixes do not meet.
        lans, wan, far_mtu, wans: see :class:`Topology`.
        offloads: False prepares the links facing masq-gate for XDP, see :meth:`set_offloads`.
    """

    def __init__(
        self,
        prefix: str = "masq-lab",
        *,
        lans: Literal[1, 2] = 1,
        wan: Literal["veth", "tun"] = "veth",
        far_mtu: int = 1500,
        wans: Literal[1, 2] = 1,
        offloads: bool = True,
    ) -> None:
        if not _SAFE_PREFIX.fullmatch(prefix):
            raise LabError(f"{prefix!r} cannot name a lab", "letters, digits, '-', '_' and '.' only")
        self.prefix = prefix
        self.topology = Topology(lans, wan, far_mtu, wans)
        self.offloads = offloads
        self.directory = Path("/tmp") / f"xdpmasq-lab.{prefix}"
        self._children: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, _: type[BaseException] | None, __: object, ___: TracebackType | None) -> None:
        self.down()

    # Its life

    def namespace(self, role: str) -> str:
        """The namespace's name, for `ip netns exec`.

        Raises:
            LabError: the drawing has no such role.
        """
        if role not in ROLES:
            raise LabError(f"the lab has no {role!r}", f"its roles are {', '.join(ROLES)}")
        return f"{self.prefix}-{role}"

    @property
    def is_up(self) -> bool:
        """Whether anything of a lab with this prefix exists, even half of one."""
        return self.directory.exists() or any(netns.exists(self.namespace(role)) for role in ROLES)

    def up(self) -> None:
        """Build everything; on failure nothing stays.

        Raises:
            HostError: not root.
            LabError: a lab of this prefix exists, or iproute2 refused something.
        """
        netns.require_root()
        if self.is_up:
            raise LabError(
                f"the lab {self.prefix} cannot be built",
                "one of that name exists",
                f"remove it with `xdpmasq lab down --name {self.prefix}`",
            )
        try:
            self._build()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End the lab's processes, delete its namespaces and files.

        Does nothing where there is nothing, and also removes what a killed process left under this prefix.

        Raises:
            HostError: there is something, and this is not root.
        """
        if not self.is_up:
            return
        netns.require_root()
        for child in self._children:
            child.terminate()
        # All roles, not only this topology's: what is left behind may have been built as another.
        names = [self.namespace(role) for role in ROLES]
        netns.end_processes(names)
        while self._children:
            _reap(self._children.pop())
        netns.delete(names)
        if self.directory.exists():
            shutil.rmtree(self.directory)
        presence.sweep()  # what an agent left that was killed in there

    def _build(self) -> None:
        self.directory.mkdir(mode=0o700)
        netns.ip_batch(self._skeleton())
        for role in self.topology.roles:
            forwards = int(role in ("transit", "provider"))
            netns.set_sysctls(self.namespace(role), {**_NO_IPV6, "net/ipv4/ip_forward": forwards})
        if self.topology.wans == 2:
            netns.set_sysctls(self.namespace("provider"), _NO_FOREIGN_SOURCES)
        if self.topology.wan == "tun":
            self._start_relay()
            netns.set_sysctls(self.namespace("transit"), _PROXY_ARP)
        configuration = self.topology.configuration()
        netns.ip_batches(
            {self.namespace(role): ["link set lo up", *commands] for role, commands in configuration.items()}
        )
        if not self.offloads:
            self.set_offloads(False)
        # The kernel's link watch tells a bridge a moment later that its ports have a carrier.
        wait_until(self._switches_forward, "the switches forward")

    def _skeleton(self) -> Iterator[str]:
        """The namespaces and the cables between them, none of which ever is in the machine's own."""
        for role in self.topology.roles:
            yield f"netns add {self.namespace(role)}"
        for number, cable in enumerate(self.topology.cables(), 5):
            # Where both ends have one ifindex, the kernel takes the pair for a single device, and its
            # link watch lets a bridge wait up to a second for the carrier.
            yield (
                f"link add {cable.interface} index {2 * number} netns {self.namespace(cable.role)} type veth"
                f" peer name {cable.other_interface} index {2 * number + 1}"
                f" netns {self.namespace(cable.other_role)}"
            )

    def _switches_forward(self) -> bool:
        ports = [self.exec(role, ["bridge", "link"]).stdout for role in ("switch", "exchange")]
        return not any("state disabled" in lines for lines in ports)

    def _start_relay(self) -> None:
        """Make and join the two TUN devices, which exist as long as the relay runs."""
        ends = [self.namespace("masq-gate"), "wan0", self.namespace("transit"), "ppp0"]
        words = [*ends, "on" if self.offloads else "off"]
        log = self.directory / "relay.log"
        with log.open("wb") as stderr:
            relay = self.popen(
                "transit",
                [sys.executable, "-m", "xdpmasq.lab.relay", *words],
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        assert relay.stdout
        if relay.stdout.readline().strip() != READY.encode():
            raise LabError("the TUN relay did not start", log.read_text().strip())

    def set_offloads(self, on: bool) -> None:
        """Prepare the ends that face masq-gate's veth interfaces for XDP there (off), or undo it (on).

        A veth hands its peer packets whose checksums and segments are left to hardware that does not
        exist, which XDP programs cannot finish; and a redirect into a veth needs GRO, that is NAPI, at
        its peer. A TUN WAN keeps the offloads it was built with.
        """
        off, gro = ("on", "off") if on else ("off", "on")
        ports = [("switch", f"gate-{interface}") for interface in self.topology.lan_interfaces]
        ports += [wire for wire in self.topology.wan_wires if wire != ("transit", "ppp0")]
        for role, port in ports:
            self.exec(role, ["ethtool", "-K", port, "gro", gro, "tx", off, "tso", off, "gso", off])
        self.offloads = on

    # Programs in it

    def exec(
        self,
        role: str,
        argv: Sequence[str | Path],
        *,
        check: bool = True,
        timeout_s: float = 30,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a namespace to its end, with both outputs captured as text.

        Raises:
            LabError: it failed and `check` is set, or it took longer than `timeout_s`.
        """
        command = f"{role}: {' '.join(map(str, argv))}"
        try:
            done = subprocess.run(
                self.argv(role, argv),
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
                input=input,
                env=env,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{command} did not end", f"it was stopped after {timeout_s:g} s") from error
        if check and done.returncode != 0:
            words = (done.stderr or done.stdout).strip()
            raise LabError(f"{command} failed", words or f"it returned {done.returncode} without a word")
        return done

    def popen(
        self,
        role: str,
        argv: Sequence[str | Path],
        *,
        stdout: int | IO[Any] | None = subprocess.DEVNULL,
        stderr: int | IO[Any] | None = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a program in a namespace; it ends with the lab, or by :meth:`stop`."""
        child = subprocess.Popen(
            self.argv(role, argv),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            # Ctrl-C at the terminal is for the lab's owner, who then ends the lab in order.
            start_new_session=True,
        )
        self._children.append(child)
        return child

    def stop(self, child: subprocess.Popen[bytes]) -> None:
        """End a program started by :meth:`popen`, politely first."""
        if child in self._children:
            self._children.remove(child)
        child.terminate()
        _reap(child)

    def argv(self, role: str, argv: Sequence[str | Path]) -> list[str]:
        """The command line that runs `argv` in a namespace."""
        return ["ip", "netns", "exec", self.namespace(role), *map(str, argv)]

    def socket(
        self, role: str, kind: socket.SocketKind, family: socket.AddressFamily = socket.AF_INET
    ) -> socket.socket:
        """An ordinary Python socket that lives in the namespace; the caller closes it."""
        with netns.entered(self.namespace(role)):
            return socket.socket(family, kind)

    def capture(self, role: str, interface: str, filter: str = "") -> Capture:
        """Start a capture; what passes after the return of this call is in it.

        Args:
            filter: in tcpdump's language, all packets if empty.
        """
        number = len(list(self.directory.glob("capture-*.pcap")))
        path = self.directory / f"capture-{number}.pcap"
        path.touch()
        log = path.with_suffix(".log")
        options: list[str | Path] = ["-Z", "root", "-n", "-U", "--immediate-mode", "-w", path]
        with log.open("wb") as stderr:
            process = self.popen(role, ["tcpdump", "-i", interface, *options, filter], stderr=stderr)
        return Capture(process, path, log)


def _reap(child: subprocess.Popen[Any]) -> None:
    try:
        child.wait(timeout=2)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for stream in (child.stdout, child.stderr):
        if stream:
            stream.close()
