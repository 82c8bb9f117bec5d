"""What a release is made of: its version and changes, and which wheels; nothing is compiled here."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "packaging"
DAY = datetime.date(2026, 12, 1)


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest):
    """Loads a module of packaging/, which is no package: its name is another's."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(TOOLS))
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in (*loaded, "debian", "mach_o"):
        sys.modules.pop(name, None)
    patch.undo()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mooli"\nversion = "0.1.0"\n[x]\nversion = "9"\n')
    changes = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-11-22\n\n- First.\n"
    (tmp_path / "CHANGELOG.md").write_text(changes)
    return tmp_path


def test_a_version_is_written_into_both_places_once(tool, project: Path) -> None:
    cut = tool("release").cut
    assert cut(project, "0.2.0", DAY) == "0.2.0"
    written = (project / "CHANGELOG.md").read_text()
    assert written == (
        "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n### Added\n\n- A thing.\n\n"
        "## [0.1.0] - 2026-11-22\n\n- First.\n"
    )
    assert (
        project / "pyproject.toml"
    ).read_text() == '[project]\nname = "mooli"\nversion = "0.2.0"\n[x]\nversion = "9"\n'
    cut(project, "0.2.0", DAY + datetime.timedelta(1))
    assert (project / "CHANGELOG.md").read_text() == written


@pytest.mark.parametrize(
    ("version", "message"), [("0.0.9", "is older than 0.1.0"), ("next", "is no version"), ("", "is no version")]
)
def test_a_version_that_is_none_or_older_changes_nothing(tool, project: Path, version: str, message: str) -> None:
    release = tool("release")
    before = [(project / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md")]
    with pytest.raises(release.ReleaseError, match=message):
        release.cut(project, version, DAY)
    assert [(project / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md")] == before


def test_a_version_without_changes_is_refused(tool, project: Path) -> None:
    release = tool("release")
    (project / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.1.0] - 2026-11-22\n\n- First.\n")
    with pytest.raises(release.ReleaseError, match="says nothing under"):
        release.cut(project, "0.2.0", DAY)
    assert 'version = "0.1.0"' in (project / "pyproject.toml").read_text()


def test_the_projects_own_files_can_be_cut(tool, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "CHANGELOG.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    changes = tmp_path / "CHANGELOG.md"  # of a version that has just been cut, nothing is unreleased
    changes.write_text(changes.read_text().replace("## [Unreleased]", "## [Unreleased]\n\n### Added\n\n- A thing.", 1))
    assert tool("release").cut(tmp_path, "77.0.0", DAY) == "77.0.0"
    assert "## [77.0.0] - 2026-12-01\n\n#" in (tmp_path / "CHANGELOG.md").read_text()


def test_headers_of_debian_have_one_configuration_for_every_system_of_64_bits(tool, tmp_path: Path) -> None:
    include = tmp_path / "include" / "python3.13"
    include.mkdir(parents=True)
    (include / "Python.h").write_text("python")
    chooses = "# if defined(__x86_64__) && defined(__LP64__)\n#  include <x86_64-linux-gnu/python3.13/pyconfig.h>\n"
    (include / "pyconfig.h").write_text(chooses + "# else\n#  error unknown\n# endif\n")
    own = tmp_path / "include" / "x86_64-linux-gnu" / "python3.13"
    own.mkdir(parents=True)
    (own / "pyconfig.h").write_text("#define SIZEOF_LONG 8\n#define PTHREAD_KEY_T_IS_COMPATIBLE_WITH_INT 1\n")
    staged = tool("wheels")._staged(tmp_path / "staged", include)
    assert (staged / "Python.h").read_text() == "python"
    keys = "#ifndef __APPLE__\n#define PTHREAD_KEY_T_IS_COMPATIBLE_WITH_INT 1\n#endif\n"
    assert (staged / "pyconfig.h").read_text() == f"#define SIZEOF_LONG 8\n{keys}"


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--only", "cp39-x86_64"), "there are cp310-x86_64"), (("--headers", "3.10=/nowhere"), "no /nowhere/Python.h")],
)
def test_wheels_for_what_is_unknown_are_refused(tool, words: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / "wheels.py"), *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_the_table_of_wheels_is_that_of_what_is_made(tool) -> None:
    rows = re.findall(r"^\| `(cp\w+-\w+)`(?:, (\w+))?", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    wheels, tried = tool("wheels"), tool("try_wheels")
    made = {interpreter.tag for interpreter in wheels.INTERPRETERS}
    assert {tag for tag, _ in rows} == made
    machines = [machine.name for machine in wheels.MACHINES]
    assert {row for row in rows if row[1]} == {(tag, machine) for tag in tried.PYTHONS for machine in machines}


def macos_module(needs: str, looked_up: str, offers: str, *, system: int = 11 << 16, is_signed: bool = True) -> bytes:
    """A Mach-O file with just what is read of one."""
    names = b"\0" + offers.encode() + b"\0"
    symbol = struct.pack("<IBBHQ", 1, 0x0F, 1, 0, 0)
    bound = b"\x3e\x40" + looked_up.encode() + b"\0\x51\x72\x88\x01\x90\x00"

    def commands(at: int) -> list[bytes]:
        library = needs.encode() + b"\0"
        found = [
            struct.pack("<6I", 0xC, 24 + len(library), 24, 0, 0, 0) + library,
            struct.pack("<6I", 0x32, 24, 1, system, 0, 0),
            struct.pack("<6I", 0x2, 24, at + len(bound), 1, at + len(bound) + len(symbol), len(names)),
            struct.pack("<12I", 0x80000022, 48, 0, 0, at, len(bound), *[0] * 6),
        ]
        return [*found, struct.pack("<4I", 0x1D, 16, 0, 0)] if is_signed else found

    length = len(b"".join(commands(0)))
    body = b"".join(commands(32 + length))
    return (
        struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 6, len(commands(0)), length, 0, 0) + body + bound + symbol + names
    )


def test_a_module_that_no_mac_could_load_is_no_wheel(tool, tmp_path: Path) -> None:
    wheels, path = tool("wheels"), tmp_path / "_native.abi3.so"
    system, python, start = "/usr/lib/libSystem.B.dylib", "_PyDict_New", "_PyInit__native"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        wheels._check_macos(wheels.read_library(path))

    check(whole := macos_module(system, python, start))
    for wrong, message in (
        (macos_module("/opt/lib/libomp.dylib", python, start), "needs /opt/lib/libomp.dylib"),
        (macos_module(system, python, start, system=14 << 16), "needs macOS 14.0"),
        (macos_module(system, python, "_PyInit__other"), "has no _PyInit__native"),
        (macos_module(system, python, start, is_signed=False), "is not signed"),
        (macos_module(system, "_puts", start), "looks for _puts"),
        (b"\x7fELF" + whole[4:], "is not for macOS"),
        (whole[:100], "is cut off"),
    ):
        with pytest.raises(Exception, match=message):
            check(wrong)


def test_importing_mooli_loads_little_and_help_no_more_than_its_words() -> None:
    code = (
        "import sys; before = set(sys.modules); {}; import json; print(json.dumps(sorted(set(sys.modules) - before)))"
    )

    path = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})"

    def loaded_by(statement: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"{path}; {code.format(statement)}"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        names: list[str] = json.loads(done.stdout.splitlines()[-1])
        return names

    assert [name for name in loaded_by("import mooli") if "mooli" in name] == ["mooli"]
    helped = loaded_by("exec('from mooli import cli\\ntry: cli.main([\"--help\"])\\nexcept SystemExit: pass')")
    ours = {name for name in helped if name.startswith("mooli")}
    assert ours <= {"mooli", "mooli.arguments", "mooli.cli", "mooli.entry", "mooli.errors", "mooli.logs"}
    assert "mooli.cli" in ours
    assert len(helped) < 110
