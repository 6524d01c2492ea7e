"""A UDP server that sends every datagram back: ``python -m xdpmasq.lab.echo ADDRESS PORT``.

A datagram that is just ``who`` is answered with the endpoint it came from, as "203.0.113.1:40000".
"""

import contextlib
import socket
import sys

WHO = b"who"


def main(address: str, port: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, int(port)))
        while True:
            datagram, (host, from_port) = server.recvfrom(65535)
            answer = f"{host}:{from_port}".encode() if datagram == WHO else datagram
            with contextlib.suppress(OSError):  # no way back, as to a private address that leaked out
                server.sendto(answer, (host, from_port))


if __name__ == "__main__":
    main(*sys.argv[1:])
