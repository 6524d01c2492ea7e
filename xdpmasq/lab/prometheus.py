"""A real Prometheus beside an agent: in masq-gate, on its loopback, quick enough to be watched and tested with."""

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdpmasq.lab import netns
from xdpmasq.lab.errors import LabError, wait_until
from xdpmasq.lab.lab import Lab
from xdpmasq.lab.servers import Server

PORT = 9090
AGENT = "127.0.0.1:9477"
_LOOPBACK = "127.0.0.1"
_CONFIG = """\
global: {{scrape_interval: {interval}, evaluation_interval: {interval}}}
rule_files: {rules}
scrape_configs:
  - job_name: xdpmasq
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus(Server):
    """Scrapes the agent of a role, and answers to :meth:`ask`.

    Args:
        rules: files of recording and alerting rules.
        interval_ms: between scrapes, which must not take longer, and between evaluations of the rules.
    """

    name = "prometheus"

    def __init__(
        self, lab: Lab, role: str = "masq-gate", *, rules: Sequence[Path] = (), interval_ms: int = 1000
    ) -> None:
        super().__init__(lab, role, _LOOPBACK)
        config = self.directory / "prometheus.yml"
        files = json.dumps([str(path.absolute()) for path in rules])
        config.write_text(_CONFIG.format(interval=f"{interval_ms}ms", rules=files, target=AGENT))
        options = {
            "config.file": config,
            "storage.tsdb.path": self.directory,
            "web.listen-address": f"{_LOOPBACK}:{PORT}",
        }
        self._start(["prometheus", *(f"--{name}={value}" for name, value in options.items())], "tcp", PORT)
        wait_until(lambda: self._get("/-/ready")[0] == http.HTTPStatus.OK, "prometheus is ready")

    def ask(self, what: str, **words: object) -> Any:
        """The data of an answer of the HTTP API: ``query``, ``query_range``, ``rules``, ``targets``.

        Raises:
            LabError: Prometheus says that the question is wrong.
        """
        status, body = self._get(f"/api/v1/{what}?{urllib.parse.urlencode(words)}")
        if status != http.HTTPStatus.OK:
            raise LabError(f"Prometheus does not answer {words or what}", body.decode())
        return json.loads(body)["data"]

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(_LOOPBACK, PORT, timeout=30)
        with netns.entered(self._lab.namespace(self._role)), contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        return list(self.ask("query", query=expression)["result"])
