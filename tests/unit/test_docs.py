"""The documents are true where a machine can tell: links, names, lengths, and every example of the README runs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import shlex
from collections.abc import Collection
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from mooli import Engine, EngineConfig, UnknownArgumentError, cli
from mooli.config import TOOL_CALL_PARSERS
from mooli.doctor.failures import explain
from mooli.doctor.torch_stack import VERSIONS, pair_findings
from mooli.errors import ConfigError, RequestError
from mooli.frontend.sampling import parse_sampling_params
from mooli.models.registry import FAMILIES
from mooli.server.config import ServerConfig
from mooli.sglang_arguments import HINTS, REFUSED
from mooli.types import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
ASCEND_GUIDES = ("docs/ascend.md", "docs/ascend.zh.md")
DOCUMENTS = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in (*READMES, "CHANGELOG.md", "SECURITY.md"))]
)
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
SOURCES = [
    path
    for folder in ("src", "simulate", "native", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix in (".py", ".cpp", ".h", ".inc", ".json")
]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


def headings(path: Path) -> set[str]:
    """Anchors of a document, as its readers make them: lower case, no punctuation, dashes for spaces."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands() -> list[str]:
    help_text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", help_text)
        with pytest.raises(SystemExit):
            cli.main(["--help"])
    return re.findall(r"^    (\w+)  ", help_text.getvalue(), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "most"),
    [("README.md", 110), ("README.zh.md", 108), ("docs/architecture.md", 200), ("docs/agents.md", 200)],
    ids=str,
)
def test_documents_stay_short(name: str, most: int) -> None:
    assert len(text_of(name).splitlines()) <= most


SHORT_SENTENCES = (
    *("README.md", "SECURITY.md", "deploy/README.md"),
    *(f"docs/{name}.md" for name in ("architecture", "cpu_backend", "extending", "add_a_model", "add_a_backend")),
    *(
        f"docs/{name}.md"
        for name in (
            *("benchmarking", "ascend", "figures", "serving", "compatibility", "lang", "agents", "batch", "page"),
            *("install", "commands", "scale"),
        )
    ),
)


@pytest.mark.parametrize("name", SHORT_SENTENCES)
def test_sentences_are_short(name: str) -> None:
    prose = re.sub(r"```.*?```|^[|#][^\n]*$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    items = re.split(r"\n\s*\n|\n(?:- |\d+\. )", prose)
    sentences = [one for item in items for one in re.split(r"(?<=[.;:?])\s", " ".join(item.split()))]
    assert len(sentences) > 10
    long = [one for one in sentences if len(one.split()) > 25]
    assert not long


def test_every_family_has_its_row() -> None:
    rows = [set(re.findall(r"`([^`]+)`", line)) for line in text_of("docs/models.md").splitlines() if "`" in line]
    for family in FAMILIES.values():
        names = {*family.architectures, *family.gguf}
        assert any(names <= row for row in rows), f"docs/models.md has no row with all of {sorted(names)}"


def test_the_documents_count_what_is_there() -> None:
    contracts = text_of("pyproject.toml").count("[[tool.importlinter.contracts]]")
    (listed,) = re.findall(r"holds these contracts of.*?\n\n(.*?)\n\n", text_of("docs/architecture.md"), re.DOTALL)
    assert len(re.findall(r"^\d+\. ", listed, re.MULTILINE)) == contracts


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in headings(path), f"{document.name} links to {target}: no such heading"


@pytest.mark.parametrize("language", ["sh", "python"])
def test_both_readmes_have_the_same_examples(language: str) -> None:
    blocks = code_blocks("README.md", language)
    assert blocks
    assert blocks == code_blocks("README.zh.md", language)


@pytest.mark.parametrize("example", code_blocks("README.md", "python"))
def test_a_python_example_runs_as_it_stands(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeEngine(monkeypatch)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    if "print" in example:
        assert "prompt tokens came from the cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [line for block in code_blocks("README.md", "sh") for line in block.splitlines() if "mooli " in line]
)
def test_a_command_line_example_runs_as_it_stands(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(monkeypatch)
    monkeypatch.setattr("mooli.server.launch.run", lambda *arguments: 0)
    monkeypatch.setattr("mooli.engine.child.EngineChild", contextlib.nullcontext)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0


def test_make_examples_are_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    for name in READMES:
        for target in re.findall(r"make ([a-z-]+)", text_of(name)):
            assert target in [*targets, "g"], target  # "apt install make g++"


def test_every_command_is_documented() -> None:
    names = commands()
    assert {"generate", "chat", "demo"} <= set(names)
    for name in names:
        assert f"`mooli {name}`" in COMPATIBILITY


def test_every_engine_argument_and_its_aliases_are_documented() -> None:
    for item in dataclasses.fields(EngineConfig):
        assert f"| `{item.name}`" in COMPATIBILITY, item.name
        for alias in item.metadata["aliases"]:
            assert f"`{alias}`" in COMPATIBILITY, alias


def test_every_server_argument_is_documented() -> None:
    table = COMPATIBILITY.split("## Server arguments that work")[1].split("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert names == {item.name for item in dataclasses.fields(ServerConfig)}


def test_every_environment_variable_that_is_read_is_documented() -> None:
    section = COMPATIBILITY.split("## Environment variables")[1].split("\n## ")[0]
    documented = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", section))
    read: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        if "doctor" not in path.parts:  # the doctor looks at those of others
            source = path.read_text(encoding="utf-8")
            read |= set(re.findall(r"""environ(?:ment)?(?:\.get\(|\[)"([A-Z_]+)\"""", source))
            read |= set(re.findall(r"""\"((?:MOOLI|HF|MODELSCOPE)_[A-Z_]+)\"""", source))
    assert {"MOOLI_ISA", "MOOLI_OFFLINE", "NOTIFY_SOCKET", "API_KEY"} <= read
    assert read <= documented


def test_every_method_and_every_argument_of_generate_is_documented() -> None:
    for name in [name for name in vars(Engine) if not name.startswith("_")]:
        assert f"| `{name}`" in COMPATIBILITY, name
    for name in list(inspect.signature(Engine.generate).parameters)[1:]:
        assert f"`{name}`" in COMPATIBILITY, name


def test_every_sampling_parameter_is_documented() -> None:
    for item in dataclasses.fields(SamplingParams):
        assert f"`{item.name}`" in COMPATIBILITY, item.name


@pytest.mark.parametrize(("kind", "known"), [("refused", REFUSED), ("hints", HINTS)], ids=["refused", "hints"])
def test_what_only_sglang_has_is_documented_and_refused_by_the_engine_by_name(
    kind: str, known: Collection[str]
) -> None:
    table = COMPATIBILITY.split(f"<!-- {kind} -->")[1].split(f"<!-- /{kind} -->")[0]
    names = re.findall(r"^\| (.*?) \| (.*?) \|$", table, re.MULTILINE)[2:]
    names = [name for row in names for name in re.findall(r"`(\w+)`", row[kind == "refused"])]
    assert sorted(names) == sorted(known)
    for name in names:
        with pytest.raises(UnknownArgumentError, match=f"{name} is known to SGLang but not supported"):
            EngineConfig.from_kwargs(model_path="m", **{name: "something"})
        EngineConfig.from_kwargs(model_path="m", **{name: None})


def test_sampling_parameters_documented_as_refused_are_refused() -> None:
    sentence = re.search(r"^Refused: (`stop_regex`.*)$", COMPATIBILITY, re.MULTILINE)
    assert sentence
    for name in re.findall(r"`(\w+)`", sentence[1]):
        with pytest.raises(RequestError, match=f"{name} is not supported yet"):
            parse_sampling_params({name: 2}, vocab_size=10, next_seed=lambda: 0)


def test_every_format_of_calls_is_in_the_page_for_agents() -> None:
    table = text_of("docs/agents.md").split("\n| models | names |\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`([^`]+)`", table)) == sorted(TOOL_CALL_PARSERS)


@pytest.mark.parametrize("backend", ["ascend", "npu", "cuda", "gpu"])
def test_backends_documented_as_missing_are_known_words(backend: str) -> None:
    assert backend in COMPATIBILITY
    assert EngineConfig.from_kwargs(model_path="m", backend=backend).backend_name in ("ascend", "cuda")
    with pytest.raises(ConfigError, match="not a backend"):
        EngineConfig.from_kwargs(model_path="m", backend=f"{backend}x")


@pytest.mark.parametrize("name", ASCEND_GUIDES)
def test_the_pairs_of_torch_and_torch_npu_are_the_doctors(name: str) -> None:
    rows = re.findall(r"^\| \**(\d[^|]*?)\** \| (.*?) \| (.*?) \|$", text_of(name), re.MULTILINE)
    table = {
        cann: tuple(zip(*(re.findall(r"[\d.]+(?:post\d)?", cell) for cell in cells), strict=True))
        for releases, *cells in rows
        for cann in re.split(", |、", releases)
    }
    assert table == {row.name: row.pairs for row in VERSIONS if row.cann >= (8, 2)}


@pytest.mark.parametrize("name", ASCEND_GUIDES)
def test_the_guide_installs_what_the_doctor_says(name: str) -> None:
    blocks = [block for block in code_blocks(name, "sh") if "MOOLI_SIMULATE_ASCEND" not in block]
    lines = [line.split("   ")[0].strip() for block in blocks for line in block.splitlines()]
    installs = [line for line in lines if line.startswith("pip install")]
    (finding,) = pair_findings(None, None, "8.2.RC1")
    assert installs == [line.split("   ")[0].replace("mooli[", ".[") for line in finding.cure]


def test_the_extra_for_npus_has_what_cann_imports_and_no_torch() -> None:
    extras = re.search(r"^ascend = \[(.*?)^\]", text_of("pyproject.toml"), re.MULTILINE | re.DOTALL)
    assert extras
    names = {re.split(r"[<>=]", name)[0] for name in re.findall(r'"(.+?)"', extras[1])}
    assert names == {
        *("absl-py", "attrs", "cffi", "decorator", "pathlib2", "protobuf", "psutil", "pyyaml", "requests", "scipy"),
        *("setuptools", "sympy"),
    }
    assert "[ascend]" in " ".join(line for finding in explain("EH9999") for line in finding.cure)


@pytest.mark.parametrize(
    "name", ["architecture.md", "cpu_backend.md", "extending.md", "add_a_model.md", "add_a_backend.md"]
)
def test_files_and_methods_that_a_guide_names_exist(name: str) -> None:
    quoted = re.findall(r"`([^`\n]+)`", text_of(f"docs/{name}"))
    known = [f"/{path.relative_to(ROOT)}" for path in [*SOURCES, ROOT / "pyproject.toml"]]
    for file in [text for text in quoted if re.fullmatch(r"[\w/]+\.(py|cpp|h|inc|toml|json)", text)]:
        assert any(path.endswith(f"/{file}") for path in known), file
    sources = [path.read_text(encoding="utf-8") for path in SOURCES if path.suffix != ".json"]
    for owner, member in re.findall(r"`([A-Z]\w+)(?:\.|::)(\w+)`", text_of(f"docs/{name}")):
        has_both = re.compile(rf"(class|struct) {owner}\b[\s\S]*\b{member}[(\[:]")
        assert any(has_both.search(source) for source in sources), f"{owner}.{member}"


def test_the_licence_is_the_one_that_the_package_names() -> None:
    text = text_of("LICENSE")
    assert 'license = "Apache-2.0"' in text_of("pyproject.toml")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")


def test_the_change_log_begins_with_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)
    assert version
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == version[1]
