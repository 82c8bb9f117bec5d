"""The files under deploy/: they parse, and every flag, path, metric and variable they name exists."""

from __future__ import annotations

import configparser
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_engine import fake_build

from mooli.arguments import flags_of
from mooli.config import EngineConfig
from mooli.server import http_server, launch
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


KUBERNETES = DEPLOY / "kubernetes"
CRDS = ("InferencePool", "HTTPRoute")
"""Kinds that a cluster knows only when their definitions are installed, of which no package ships a schema."""


def objects(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What a file of manifests declares, by kind and name."""
    loaded = [item for item in yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")) if item]
    found = {(item["kind"], item["metadata"]["name"]): item for item in loaded}
    assert len(found) == len(loaded), "two objects have one name"
    return found


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    resources = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    return {key: item for name in resources for key, item in objects(name).items()}


@pytest.fixture(scope="module")
def replicas(manifests) -> dict[str, Any]:
    return manifests["StatefulSet", "mooli"]["spec"]


@pytest.fixture(scope="module")
def pod(replicas) -> dict[str, Any]:
    return replicas["template"]["spec"]


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
    lingering_s = http_server.CLOSE_WAIT_S + http_server.DEATH_LINGER_S
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
def test_objects_are_of_the_schemas_of_their_kinds(manifests):
    validate = pytest.importorskip("kubernetes_validate")
    for (kind, _), item in manifests.items():
        if kind not in CRDS:
            validate.validate(item, validate.latest_version(), strict=True)


def test_kustomize_finds_every_file_and_every_object_it_changes(manifests):
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))
    assert (kustomization["apiVersion"], kustomization["kind"]) == ("kustomize.config.k8s.io/v1beta1", "Kustomization")
    (generated,) = kustomization["configMapGenerator"]
    named = {*kustomization["resources"], *generated["files"]}
    assert {path.name for path in KUBERNETES.iterdir()} == {*named, "kustomization.yaml"}
    images = {container["image"].partition(":")[0] for _, _, container in _containers(manifests)}
    assert {item["name"] for item in kustomization["images"]} <= images
    scaled = {name for kind, name in manifests if kind in ("Deployment", "StatefulSet")}
    assert {item["name"] for item in kustomization["replicas"]} <= scaled


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
def test_kustomize_builds_the_folder(manifests):
    command = ["kubectl", "kustomize", str(KUBERNETES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(done.stdout)}
    (config,) = built.keys() - manifests.keys()
    assert config[0] == "ConfigMap" and set(built[config]["data"]) == {"picker.yaml"}
    picker = built["Deployment", "mooli-picker"]["spec"]["template"]["spec"]
    assert picker["volumes"][0]["configMap"]["name"] == config[1]
    assert built.keys() - {config} == manifests.keys()
    assert built["StatefulSet", "mooli"] == manifests["StatefulSet", "mooli"]


def _containers(manifests) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for (kind, name), item in manifests.items():
        if kind in ("Deployment", "StatefulSet"):
            pod = item["spec"]["template"]["spec"]
            yield from ((name, pod, container) for container in pod["containers"])


def test_what_is_mounted_is_there(manifests):
    generated = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))["configMapGenerator"]
    for name, pod, container in _containers(manifests):
        claims = manifests.get(("StatefulSet", name), {"spec": {}})["spec"].get("volumeClaimTemplates", [])
        there = {item["name"] for item in pod["volumes"]} | {item["metadata"]["name"] for item in claims}
        assert {item["name"] for item in container["volumeMounts"]} == there
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in {item["name"] for item in generated}


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
    assert grace_s > float(pause) + value_of("--shutdown-timeout", container["args"]) + http_server.CLOSE_WAIT_S


def test_the_pod_has_few_rights_and_its_keys_from_a_secret(pod):
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert set(container["resources"]) == {"requests", "limits"}
    keys = {item["name"]: item["valueFrom"]["secretKeyRef"]["key"] for item in container["env"] if "valueFrom" in item}
    assert keys == {"MOOLI_API_KEY": "api-key", "MOOLI_ADMIN_API_KEY": "admin-api-key"}


def test_service_pool_replicas_and_annotations_mean_the_same_pods(manifests, replicas):
    service, pool = manifests["Service", "mooli"]["spec"], manifests["InferencePool", "mooli"]["spec"]
    template = replicas["template"]
    labels = template["metadata"]["labels"]
    assert service["selector"] == replicas["selector"]["matchLabels"] == pool["selector"]["matchLabels"]
    assert service["selector"].items() <= labels.items() and replicas["serviceName"] == "mooli"
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    annotations = template["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in OPEN_GETS
    assert annotations["prometheus.io/port"] == str(port["containerPort"]) == str(ServerConfig().port)


def test_no_answer_is_longer_than_a_draining_pod_or_the_route_waits(manifests, pod):
    (container,) = pod["containers"]
    longest_s = value_of("--request-timeout", container["args"])
    assert value_of("--shutdown-timeout", container["args"]) >= longest_s
    (rule,) = manifests["HTTPRoute", "mooli"]["spec"]["rules"]
    assert seconds(rule["timeouts"]["request"]) > longest_s


def test_what_a_replica_keeps_is_on_a_volume_of_its_own(replicas, pod):
    (container,) = pod["containers"]
    (claim,) = replicas["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    mounts = {item["name"]: item["mountPath"] for item in container["volumeMounts"]}
    (kept,) = [item["value"] for item in container["env"] if item["name"] == "XDG_CACHE_HOME"]
    assert mounts[claim["metadata"]["name"]] == kept


def test_the_route_leads_to_the_pool_and_the_pool_to_the_picker(manifests):
    pool = manifests["InferencePool", "mooli"]
    (rule,) = manifests["HTTPRoute", "mooli"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    group, _, version = pool["apiVersion"].partition("/")
    assert (backend["group"], backend["kind"], backend["name"]) == (group, "InferencePool", pool["metadata"]["name"])
    assert version == "v1" and manifests["HTTPRoute", "mooli"]["apiVersion"] == "gateway.networking.k8s.io/v1"
    picker = pool["spec"]["endpointPickerRef"]
    service = manifests["Service", picker["name"]]["spec"]
    deployment = manifests["Deployment", picker["name"]]["spec"]
    assert service["selector"] == deployment["template"]["metadata"]["labels"]
    (container,) = deployment["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (grpc,) = [port for port in service["ports"] if port["port"] == picker["port"]["number"]]
    assert ports[grpc["targetPort"]] == grpc["port"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert (
            container[probe]["grpc"]["port"]
            == ports["grpc-health"]
            == value_of("--grpc-health-port", container["args"])
        )
    assert (
        f"--pool-name={pool['metadata']['name']}" in container["args"] and f"--pool-group={group}" in container["args"]
    )
    (account,) = manifests["RoleBinding", "mooli-picker"]["subjects"]
    assert ("ServiceAccount", account["name"]) in manifests
    assert deployment["template"]["spec"]["serviceAccountName"] == account["name"]


def picker_plugins() -> dict[str, dict[str, Any]]:
    config = yaml.safe_load((KUBERNETES / "picker.yaml").read_text(encoding="utf-8"))
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    assert {item["pluginRef"] for item in profile["plugins"]} <= set(plugins)
    return plugins


def test_the_picker_asks_for_gauges_that_every_scrape_has(replicas):
    """As its index is sized by them: a family without a sample would be an error of each scrape."""
    plugins = picker_plugins()
    extractor = plugins["core-metrics-extractor"]
    (engine,) = extractor["engineConfigs"]
    label = replicas["template"]["metadata"]["labels"]["llm-d.ai/engine-type"]
    assert engine["name"] == extractor["defaultEngine"] == label
    assert plugins["metrics-data-source"]["path"] in OPEN_GETS
    asked = {value for name, value in engine.items() if name.endswith("Spec")}
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", RENDERED, re.MULTILINE))
    samples = {line.partition("{")[0] for line in RENDERED.splitlines() if not line.startswith("#")}
    assert len(asked) == 5 and asked <= samples
    assert {kinds[name] for name in asked} == {"gauge"}


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
        assert (DEPLOY / name).exists()
    assert {path.name for path in DEPLOY.iterdir()} - {"README.md"} <= set(re.findall(r"`([\w.-]+)`", README))
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert flags_in(prose.replace("docker stop --time", "")) <= flags()
    families = {line.split()[2] for line in RENDERED.splitlines() if line.startswith("# TYPE ")}
    assert set(METRIC.findall(README)) <= families
    assert set(re.findall(r"`(/[a-z_/{}]*)`", README)) == OPEN_GETS


def test_keys_come_from_the_variables_that_are_named_everywhere(monkeypatch):
    monkeypatch.setenv("MOOLI_API_KEY", "one")
    monkeypatch.setenv("MOOLI_ADMIN_API_KEY", "two")
    config = launch.with_environment(ServerConfig())
    assert (config.api_key, config.admin_api_key) == ("one", "two")
    for text in (README, (DEPLOY / "mooli.service").read_text(), (KUBERNETES / "mooli.yaml").read_text()):
        assert {"MOOLI_API_KEY", "MOOLI_ADMIN_API_KEY"} <= set(re.findall(r"MOOLI_[A-Z_]*KEY", text))
