"""The files under deploy/: they parse, and every flag, path, metric and variable they name exists."""

from __future__ import annotations

import configparser
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_engine import fake_build

from mooli.arguments import flags_of
from mooli.config import EngineConfig
from mooli.server import launch
from mooli.server.app import ROUTES
from mooli.server.config import ServerConfig
from mooli.server.metrics import Metrics
from mooli.server.routing import Access

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")

FACTS = fake_build(EngineConfig.from_kwargs(model_path="fake")).facts
RENDERED = Metrics("m", FACTS, ServerConfig()).render().decode()
METRIC = re.compile(r"\b((?:sglang|mooli):[a-z_0-9]+)")

OPEN_GETS = {route.path for route in ROUTES if route.access is Access.OPEN and "GET" in route.methods}


def metric_names() -> set[str]:
    """Every name a PromQL expression may ask for, whether or not there is a sample yet."""
    names = set()
    for line in RENDERED.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            names |= {f"{name}_bucket", f"{name}_count", f"{name}_sum"} if kind == "histogram" else {name}
    return names


def flags() -> set[str]:
    items = [*dataclasses.fields(ServerConfig), *dataclasses.fields(EngineConfig)]
    return set(flags_of(*(item.name for item in items)))


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    """The unit; of a key given several times, the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string((DEPLOY / "mooli.service").read_text(encoding="utf-8"))
    return parser


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    loaded = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {item["kind"]: item for item in loaded}


@pytest.fixture(scope="module")
def pod(manifests) -> dict[str, Any]:
    return manifests["Deployment"]["spec"]["template"]["spec"]


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(min|s|)", text).groups()
    return int(number) * (60 if unit == "min" else 1)


def value_of(flag: str, words: list[str]) -> float:
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return float(joined[0] if joined else words[words.index(flag) + 1])


# -- Grafana and Prometheus ------------------------------------------------------------------------------------------
def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name in ("expr", "definition") or (name == "query" and isinstance(item, str)):
                yield item
            else:
                yield from expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from expressions(item)


def test_the_dashboard_asks_only_for_metrics_there_are():
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    asked = [name for text in expressions(dashboard) for name in METRIC.findall(text)]
    assert len(set(asked)) > 20
    assert set(asked) <= metric_names()


def test_the_dashboard_asks_only_for_labels_there_are():
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    metrics = Metrics("m", FACTS, ServerConfig())
    metrics.http_request("/generate", "POST")
    metrics.http_response("/generate", "POST", 200)
    rendered = metrics.render().decode()
    for text in expressions(dashboard):
        for name, selector in re.findall(METRIC.pattern + r"\{([^}]*)\}", text):
            sample = next(line for line in rendered.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
            for label in re.findall(r"(\w+)\s*=~?", selector):
                assert label == "instance" or f'{label}="' in sample, (name, label)


def test_every_panel_has_a_place_of_its_own_and_a_question():
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["title"] and panel["description"] and all(target["expr"] for target in panel["targets"])


def test_prometheus_scrapes_a_route_that_needs_no_key():
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["metrics_path"] in OPEN_GETS
    assert job["static_configs"][0]["targets"] == [f"localhost:{ServerConfig().port}"]


# -- systemd ---------------------------------------------------------------------------------------------------------
def test_the_unit_starts_a_server_with_flags_there_are(unit):
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[1] == "serve" and words[0].endswith("/mooli")
    assert flags_in(" ".join(words)) <= flags()
    assert unit["Service"]["Type"] == "notify"


def test_systemd_waits_longer_than_the_server_takes(unit):
    words = shlex.split(unit["Service"]["ExecStart"])
    lingering_s = launch.CLOSE_WAIT_S + launch.DEATH_LINGER_S
    assert seconds(unit["Service"]["TimeoutStopSec"]) > value_of("--shutdown-timeout", words) + lingering_s
    assert seconds(unit["Service"]["WatchdogSec"]) > value_of("--watchdog-timeout", words)


def test_the_unit_gives_the_service_few_rights(unit):
    service = unit["Service"]
    yes = ["DynamicUser", "NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables"]
    assert all(service[name] == "yes" for name in yes)
    assert service["CapabilityBoundingSet"] == "" and service["ProtectSystem"] == "strict"
    # The link to the engine process is a Unix socket.
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
    assert service["EnvironmentFile"].startswith("/etc/")


# -- Kubernetes ------------------------------------------------------------------------------------------------------
def test_the_pod_starts_a_server_with_flags_there_are(pod):
    (container,) = pod["containers"]
    assert flags_in(" ".join(container["args"])) <= flags()
    assert "command" not in container  # the image's entry point listens on all addresses


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/health/ready"), ("readinessProbe", "/health/ready"), ("livenessProbe", "/health/live")],
)
def test_probes_ask_routes_that_need_no_key(pod, probe, path):
    (container,) = pod["containers"]
    asked = container[probe]["httpGet"]
    assert asked["path"] == path and path in OPEN_GETS
    assert asked["port"] in {port["name"] for port in container["ports"]}


def test_kubernetes_waits_longer_than_the_server_takes(pod):
    (container,) = pod["containers"]
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    grace_s = pod["terminationGracePeriodSeconds"]
    assert grace_s > float(pause) + value_of("--shutdown-timeout", container["args"]) + launch.CLOSE_WAIT_S


def test_the_pod_has_few_rights_and_its_keys_from_a_secret(pod):
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert set(container["resources"]) == {"requests", "limits"}
    keys = {item["name"]: item["valueFrom"]["secretKeyRef"]["key"] for item in container["env"]}
    assert keys == {"MOOLI_API_KEY": "api-key", "MOOLI_ADMIN_API_KEY": "admin-api-key"}


def test_service_deployment_and_annotations_mean_the_same_pods(manifests):
    deployment, service = manifests["Deployment"]["spec"], manifests["Service"]["spec"]
    template = deployment["template"]
    labels = template["metadata"]["labels"]
    assert service["selector"] == labels == deployment["selector"]["matchLabels"]
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    annotations = template["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in OPEN_GETS
    assert annotations["prometheus.io/port"] == str(port["containerPort"]) == str(ServerConfig().port)
    mounted = {item["name"] for item in container["volumeMounts"]}
    assert mounted == {item["name"] for item in template["spec"]["volumes"]}


# -- Docker ----------------------------------------------------------------------------------------------------------
def instructions(name: str) -> list[str]:
    lines = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    return [line.partition(" ")[2].strip() for line in lines if line.startswith(f"{name} ")]


def test_the_image_starts_a_server_with_flags_there_are():
    (entry,) = map(json.loads, instructions("ENTRYPOINT"))
    assert entry[:2] == ["mooli", "serve"] and flags_in(" ".join(entry)) <= flags()
    assert instructions("EXPOSE") == [entry[entry.index("--port") + 1]]


def test_the_image_is_built_of_files_there_are_and_all_the_build_names():
    copied = [word for line in instructions("COPY") for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    needed = re.findall(r'"(\w+\.md|LICENSE)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"pyproject.toml", "CMakeLists.txt", "src", "native", *needed} <= set(copied)


def test_the_image_runs_without_root_and_asks_for_its_own_health():
    assert instructions("USER") == ["10001:10001"] and "--uid 10001" in DOCKERFILE
    (check,) = instructions("HEALTHCHECK")
    (path,) = re.findall(r"http://127\.0\.0\.1:30000(/[\w/]+)", check)
    assert path in OPEN_GETS
    compile(json.loads(check[check.index("CMD ") + 4 :])[2], "health check", "exec")


# -- the words about them --------------------------------------------------------------------------------------------
def test_the_page_names_files_flags_routes_and_metrics_there_are():
    for name in re.findall(r"^\| `([\w.-]+)` \|", README, re.MULTILINE):
        assert (DEPLOY / name).is_file()
    assert {path.name for path in DEPLOY.iterdir()} - {"README.md"} <= set(re.findall(r"`([\w.-]+)`", README))
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert flags_in(prose.replace("docker stop --time", "")) <= flags()
    families = {line.split()[2] for line in RENDERED.splitlines() if line.startswith("# TYPE ")}
    assert set(METRIC.findall(README)) <= families
    assert set(re.findall(r"`(/[a-z_/]+)`", README)) == OPEN_GETS


def test_keys_come_from_the_variables_that_are_named_everywhere(monkeypatch):
    monkeypatch.setenv("MOOLI_API_KEY", "one")
    monkeypatch.setenv("MOOLI_ADMIN_API_KEY", "two")
    config = launch._with_environment(ServerConfig())
    assert (config.api_key, config.admin_api_key) == ("one", "two")
    for text in (README, (DEPLOY / "mooli.service").read_text(), (DEPLOY / "kubernetes.yaml").read_text()):
        assert {"MOOLI_API_KEY", "MOOLI_ADMIN_API_KEY"} <= set(re.findall(r"MOOLI_[A-Z_]*KEY", text))
