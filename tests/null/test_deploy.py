"""deploy/: what it names exists here. No container is built: the files are read, not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.null.api.test_metrics_page import documented
from tests.null.repo import ROOT
from xllm.cli.main import COMMANDS, parser_for
from xllm.config import ClusterConfig, EngineConfig, FrontConfig, ServerConfig
from xllm.config.env import NOT_FLAGS
from xllm.config.fields import settings

DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "xllm.json").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def ours() -> dict[str, dict[str, Any]]:
    return {name: s for name, s in COMPOSE["services"].items() if s.get("image") == "xllm"}


def test_every_file_parses() -> None:
    files = [p for p in DEPLOY.rglob("*") if p.suffix in (".yaml", ".yml", ".json")]
    assert len(files) >= 6
    for path in files:
        text = path.read_text()
        assert json.loads(text) if path.suffix == ".json" else yaml.safe_load(text), path


@pytest.mark.parametrize("name", ours())
def test_our_commands_are_understood_by_our_parser(name: str) -> None:
    command, *words = ours()[name]["command"]
    assert command in COMMANDS
    parser, _ = parser_for(command)
    parser.parse_args(words)  # ends the test with the parser's complaint


def test_the_images_own_command_is_understood() -> None:
    command, *words = json.loads(re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[0])
    parser_for(command)[0].parse_args(words)
    assert re.search(r'^ENTRYPOINT \["xllm"\]$', DOCKERFILE, re.MULTILINE)


def test_every_variable_is_a_setting() -> None:
    known = settings(EngineConfig, FrontConfig, ClusterConfig, ServerConfig)
    names = {f"XLLM_{name.upper()}" for name in known} | set(NOT_FLAGS)
    used = {v for s in ours().values() for v in s.get("environment", {})}
    used |= set(re.findall(r"\b(XLLM_\w+)=", DOCKERFILE))
    used |= set(re.findall(r"\b(XLLM_\w+)\b", (DEPLOY / "README.md").read_text()))
    assert used
    assert used - names == set()


def test_what_is_copied_and_mounted_exists() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [s for line in copied for s in line.split()]
    assert "src" in sources
    assert [s for s in sources if not (ROOT / s).exists()] == []
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{s}" for s in sources} <= set(ignore), "the build would not see what it copies"
    mounts = [m.split(":")[0] for s in COMPOSE["services"].values() for m in s.get("volumes", [])]
    files = [m for m in mounts if m.startswith("./")]
    assert files
    assert [m for m in files if not (DEPLOY / m).exists()] == []
    assert {m for m in mounts if not m.startswith(".")} <= set(COMPOSE["volumes"])


def test_services_depend_on_services_and_listen_where_others_look() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    (target,) = scraped[0]["targets"]
    host, port = target.split(":")
    assert f"--port={port}" in services[host]["command"]
    assert f"--allowed-hosts={host}" in services[host]["command"], "the Host check would refuse the scrape"
    for name in ("instance-1", "instance-2"):
        listen = next(w for w in services[name]["command"] if w.startswith("--listen="))
        assert services[name]["environment"]["XLLM_ADVERTISE"] == f"{name}:{listen.rsplit(':', 1)[1]}"


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [p for s in COMPOSE["services"].values() for p in s.get("ports", [])]
    assert ports
    assert all(p.startswith("127.0.0.1:") for p in ports)


def test_the_image_is_small_in_rights_and_parts() -> None:
    final = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER xllm$", final, re.MULTILINE)
    assert "g++" not in final
    assert "torch" not in DOCKERFILE.split("FROM", 1)[1].lower()
    check = re.search(r"HEALTHCHECK.*?CMD (\[.*?\])", final, re.DOTALL)
    assert check is not None
    assert "/ready" in json.loads(check[1])[-1]
    compile(json.loads(check[1])[-1], "HEALTHCHECK", "exec")


def expressions() -> list[str]:
    return [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]


def test_every_metric_of_the_dashboard_is_exported_with_the_labels_it_uses() -> None:
    known = documented()
    series: dict[str, frozenset[str]] = {}
    for name, (kind, labels) in known.items():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}[kind]
        for ending in endings:
            series[name + ending] = labels | ({"le"} if ending == "_bucket" else set())
    used = 0
    for text in [*expressions(), DASHBOARD["templating"]["list"][0]["query"]["query"]]:
        for name, selector in re.findall(r"((?:vllm|xllm):\w+)(?:\{([^}]*)\})?", text):
            assert name in series, f"{name} in {text}"
            assert set(re.findall(r"(\w+)=~?\"", selector)) <= series[name], text
            used += 1
        groups = {label for part in re.findall(r"by \(([^)]*)\)", text) for label in part.split(", ")}
        labels = frozenset().union(*(series[n] for n in re.findall(r"(?:vllm|xllm):\w+", text)))
        assert groups <= labels, text
    assert used > 30


def test_the_dashboard_shows_what_operators_ask_for() -> None:
    text = " ".join(expressions())
    for name in (
        *("request_success", "time_to_first_token", "time_per_output_token", "num_requests_waiting"),
        *("kv_cache_usage", "prefix_cache_hits", "requests_moved", "instance_deaths", "instance_requests"),
    ):
        assert name in text, name
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_documents_say_that_no_container_was_run() -> None:
    page = Path(DEPLOY / "README.md").read_text()
    assert "checked statically only" in page
