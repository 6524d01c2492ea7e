"""Every query of every dashboard and rule, asked of a real Prometheus that scrapes a real agent at work.

::

    a-box, b-box ── lan0 masq-gate wan0 ── internet (echo)
                      lo: agent :9477 ◀── Prometheus :9090
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netkit import ECHO, Gateway, answers, soon

from xdpmasq import bpf
from xdpmasq.lab.prometheus import Prometheus
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import HOSTS, PUBLIC

yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.xdist_group("dashboards")

FOLDER = Path(__file__).parents[2] / "dashboards"
RULES = FOLDER / "rules.yml"
ALERT = re.compile(r"(?P<query>.+) (?:==|>) [\d.]+")
CONFIG = f"""\
[metrics]
top_hosts = 5

[ports]
block_size = 512

[log]
file = "nat.json"

[[forward]]
protocol = "udp"
ports = 8080
to = "{HOSTS["b-box"]}:80"
"""
VARIABLES = {
    "$instance": "127.0.0.1:9477",
    "$host": HOSTS["a-box"],
    "$__rate_interval": "20s",
    "$__range": "1m",
}


def panel_queries() -> Iterator[Any]:
    for path in sorted(FOLDER.glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield pytest.param(target["expr"], id=f"{path.stem}: {panel['title']} {target['refId']}")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_queries() -> Iterator[Any]:
    for rule in rules():
        if "alert" in rule:
            match = ALERT.fullmatch(rule["expr"])
            assert match, rule
            yield pytest.param(match["query"], id=rule["alert"])
        else:
            yield pytest.param(rule["record"], id=rule["record"])


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has watched some seconds of traffic."""
    config = tmp_path_factory.mktemp("dashboards") / "masq.toml"
    config.write_text(CONFIG)
    with Gateway.in_new_lab("xdp", attach=False) as gateway, bpf.counting_runs():
        EchoServer(gateway.lab)
        gateway.attach("--config", str(config))
        prometheus = Prometheus(gateway.lab, rules=[RULES], interval_ms=1000)
        with gateway.udp("a-box") as one, gateway.udp("b-box") as other, gateway.udp("internet") as stranger:

            def talk() -> None:
                assert all(answers(client, ECHO) for client in (one, other) for _ in range(5))
                stranger.sendto(b"let me in", (PUBLIC, 8080))

            def has_seen_enough() -> bool:
                talk()
                found = prometheus.query('rate(xdpmasq_translated_packets_total{path="fast"}[20s]) > 0')
                return len(found) == 2 and bool(prometheus.query("instance:xdpmasq_wan_flaps:increase15m"))

            soon(has_seen_enough, "Prometheus has seen traffic on the fast path", timeout_s=60)
        yield prometheus


@pytest.mark.parametrize("query", [*panel_queries(), *rule_queries()])
def test_a_query_returns_data(prometheus: Prometheus, query: str) -> None:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    # A scrape that takes longer than the second it has leaves a gap.
    soon(lambda: bool(prometheus.query(query)), f"there is data for {query}", timeout_s=10)


def test_prometheus_takes_the_rules(prometheus: Prometheus) -> None:
    taken = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(taken) == len(rules())
    assert [rule["name"] for rule in taken if rule.get("lastError")] == []


def test_nothing_alarms_about_a_gateway_that_works(prometheus: Prometheus) -> None:
    assert [alert["labels"] for alert in prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"] == []


def test_what_variables_offer(prometheus: Prometheus) -> None:
    for path in sorted(FOLDER.glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert match
            series = prometheus.query(match[1].replace("$instance", VARIABLES["$instance"]))
            assert VARIABLES[f"${variable['name']}"] in {each["metric"][match[2]] for each in series}
