"""SIP between telephones of flesh and blood: baresip inside and outside, called directly or by way of kamailio.

::

    a-box: alice ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10: kamailio, or dave
                                                   ─ transit ─ far 198.51.100.10: bob

What each plays is noise that G.711 keeps, so what the other hears is compared sample by sample. The kernel's NAT and
its helper are asked the same. Mode: tc.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import socket
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
from netkit import Gateway, soon

from xdpmasq import algs
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, PUBLIC

KERNELS = """
table ip xdpmasq_test {
    ct helper sip-udp { type "sip" protocol udp; }
    ct helper sip-tcp { type "sip" protocol tcp; }
    chain marked {
        type filter hook prerouting priority filter;
        udp dport 5060 ct helper set "sip-udp"; tcp dport 5060 ct helper set "sip-tcp";
    }
    chain out { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }
}
"""


@pytest.fixture(scope="module")
def ours() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=(algs.Use.parse("sip"),))
        yield made


@pytest.fixture(scope="module")
def deaf() -> Iterator[Gateway]:
    """xdpmasq without its ALG."""
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=())
        yield made


@pytest.fixture(scope="module")
def kernels() -> Iterator[Gateway]:
    """xdpmasq is not attached."""
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.sysctl("net.ipv4.ip_forward", 1)
        made.lab.exec("masq-gate", ["nft", "-f", "-"], input=KERNELS)
        yield made


# --- kamailio --------------------------------------------------------------------------------------

KAMAILIO = """\
#!KAMAILIO
debug=2
log_stderror=yes
children=2
tcp_children=2
auto_aliases=no
alias="lab.test"
listen=udp:{address}:5060
listen=tcp:{address}:5060
loadmodule "tm.so"
loadmodule "tmx.so"
loadmodule "sl.so"
loadmodule "rr.so"
loadmodule "pv.so"
loadmodule "maxfwd.so"
loadmodule "textops.so"
loadmodule "siputils.so"
loadmodule "usrloc.so"
loadmodule "registrar.so"
request_route {{
    if (!mf_process_maxfwd_header("10")) {{ sl_send_reply("483", "Too Many Hops"); exit; }}
    if (is_method("REGISTER")) {{ save("location"); exit; }}
    if (has_totag()) {{
        if (loose_route() || is_method("ACK")) {{ t_relay(); }}
        exit;
    }}
    if (is_method("CANCEL")) {{ t_relay_cancel(); exit; }}
    record_route();
    if (!lookup("location")) {{ sl_send_reply("404", "Not Found"); exit; }}
    t_relay();
}}
"""


class Registrar(Server):
    """kamailio: who registers is found by others, and requests of a call go by it."""

    _numbers = itertools.count()

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        self.name = f"kamailio-{next(self._numbers)}"
        super().__init__(lab, role, address)
        config = self.directory / "config"
        config.write_text(KAMAILIO.format(address=address))
        options = ["-DD", "-E", "-m", "16", "-M", "4", "-Y", self.directory, "-f", config]
        self._start(["/usr/sbin/kamailio", *options], "tcp", 5060)


# --- baresip ---------------------------------------------------------------------------------------

BARESIP = """\
sip_listen {address}:{port}
audio_source aufile,{directory}/played.wav
audio_player aubridge,none
audio_alert aubridge,none
audio_buffer 20-160
jitter_buffer_delay 5-10
rtp_ports 10000-20000
ctrl_tcp_listen {address}:4444
snd_path {directory}
module_path /usr/lib/baresip/modules
module g711.so
module aufile.so
module aubridge.so
module sndfile.so
module_tmp uuid.so
module_tmp account.so
module_app ctrl_tcp.so
module_app menu.so
"""


def ulaw(code: int) -> int:
    """What a byte of G.711 stands for."""
    code = ~code & 0xFF
    size = (((code & 15) << 3) + 0x84 << (code >> 4 & 7)) - 0x84
    return -size if code & 0x80 else size


SOUNDS = [ulaw(code).to_bytes(2, "little", signed=True) for code in range(256) if ulaw(code)]


class Phone(Server):
    """baresip; it takes every call, and keeps what it hears.

    Args:
        account: as baresip writes it.
    """

    _numbers = itertools.count()

    def __init__(self, lab: Lab, role: str, address: str, account: str, port: int = 5060) -> None:
        self.name = f"baresip-{next(self._numbers)}"
        super().__init__(lab, role, address)
        self.played = b"".join(random.choices(SOUNDS, k=80_000))
        with wave.open(str(self.directory / "played.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(self.played)
        (self.directory / "config").write_text(BARESIP.format(address=address, port=port, directory=self.directory))
        (self.directory / "accounts").write_text(f"{account};answermode=auto\n")
        (self.directory / "contacts").touch()
        self._start(["baresip", "-4", "-s", "-v", "-f", self.directory], "tcp", 4444)

    def does(self, command: str, words: str = "") -> None:
        """A command of its menu, as a netstring."""
        text = json.dumps({"command": command, "params": words})
        with self._lab.socket(self._role, socket.SOCK_STREAM) as control:
            control.settimeout(2)
            control.connect((self.address, 4444))
            control.sendall(f"{len(text)}:{text},".encode())
            control.recv(1000)

    def says(self, pattern: str) -> None:
        soon(lambda: re.search(pattern, self.wrote()) is not None, f"{self._role}'s phone says {pattern}", 6)

    def wrote(self) -> str:
        return self.log.read_text(errors="replace")

    def heard(self) -> bytes:
        """Samples; the file's header tells of them only some time after the call."""
        return b"".join(file.read_bytes()[44:] for file in self.directory.glob("dump-*-dec.wav"))


def common(heard: bytes, played: bytes) -> int:
    """How many milliseconds of what was played have been heard, frame by frame and in order."""
    at = found = 0
    for start in range(0, len(heard) - 319, 320):
        here = played.find(heard[start : start + 320], at)
        if here >= 0:
            at, found = here + 320, found + 20
    return found


def call(caller: Phone, called: Phone, uri: str) -> str:
    """For two seconds, of which each has heard the most; returns how much."""
    caller.does("dial", uri)
    try:
        for phone in (caller, called):
            phone.says("incoming rtp for 'audio' established")
            soon(lambda phone=phone: len(phone.heard()) > 32_000, "two seconds have been heard", 4)  # type: ignore[misc]
    finally:
        caller.does("hangup")
    called.says("terminated|session closed")
    heard = common(caller.heard(), called.played), common(called.heard(), caller.played)
    assert min(heard) >= 1800
    return f"the caller has heard {heard[0]} ms of what was said, the called {heard[1]} ms"


@dataclass(frozen=True)
class Scene:
    """One call."""

    gateway: Gateway
    name: str
    stack: contextlib.ExitStack

    def phone(self, role: str, account: str) -> Phone:
        address = {"a-box": HOSTS["a-box"], "internet": INTERNET, "far": FAR}[role]
        return self.until_its_end(Phone(self.gateway.lab, role, address, account))

    def until_its_end(self, server: AnyServer) -> AnyServer:
        self.stack.callback(server.stop)
        return server


AnyServer = TypeVar("AnyServer", bound=Server)


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        yield Scene(request.getfixturevalue(request.param), request.param, stack)


def direct(scene: Scene, transport: str) -> str:
    end = f";transport={transport}>;regint=0"
    alice = scene.phone("a-box", f"<sip:alice@{HOSTS['a-box']}{end}")
    dave = scene.phone("internet", f"<sip:dave@{INTERNET}{end}")
    return call(alice, dave, f"sip:dave@{INTERNET};transport={transport}")


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("scene", ["ours", "kernels"], indirect=True)
def test_a_call_without_a_registrar(scene: Scene, transport: str, tell: Callable[[str], None]) -> None:
    tell(f"SIP over {transport}, baresip to baresip, {scene.name} NAT: {direct(scene, transport)}")


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("scene", ["ours"], indirect=True)
def test_a_telephone_behind_a_forward_is_called(scene: Scene, transport: str, tell: Callable[[str], None]) -> None:
    end, tables = f";transport={transport}>;regint=0", scene.gateway.tables
    tables.flush(tables.live_slots())  # between the same two ports there can be one session only
    scene.stack.enter_context(scene.gateway.forward(transport, "5060", f"{HOSTS['a-box']}:5060"))
    alice = scene.phone("a-box", f"<sip:alice@{HOSTS['a-box']}{end}")
    dave = scene.phone("internet", f"<sip:dave@{INTERNET}{end}")
    said = call(dave, alice, f"sip:alice@{PUBLIC};transport={transport}")
    tell(f"SIP over {transport}, baresip outside to baresip behind a forward: {said}")


@pytest.mark.parametrize("scene", ["deaf"], indirect=True)
def test_without_the_alg_there_is_no_sound(scene: Scene, tell: Callable[[str], None]) -> None:
    with pytest.raises(AssertionError, match="in vain until a-box's phone says incoming rtp"):
        direct(scene, "udp")
    tell("SIP over udp, baresip to baresip, without the ALG: the caller hears nothing")


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize(
    ("scene", "caller"), [("ours", "inside"), ("ours", "outside"), ("kernels", "outside")], indirect=["scene"]
)
def test_a_call_by_way_of_a_registrar(scene: Scene, caller: str, transport: str, tell: Callable[[str], None]) -> None:
    """The other's sound comes from an address that has not been spoken to.

    Where the caller is inside, the kernel lets it in or not, depending on whose sound comes first.
    """
    scene.until_its_end(Registrar(scene.gateway.lab))
    end = f"@{INTERNET};transport={transport}"
    phones = {
        name: scene.phone(role, f"<sip:{name}{end}>;regint=60;auth_pass=x")
        for role, name in (("a-box", "alice"), ("far", "bob"))
    }
    for phone in phones.values():
        phone.says("200 OK")
    one, other = ("alice", "bob") if caller == "inside" else ("bob", "alice")
    said = call(phones[one], phones[other], f"sip:{other}{end}")
    tell(f"SIP over {transport} by way of kamailio, called from {caller}, {scene.name} NAT: {said}")
