"""A version, cut and built: `make release VERSION=0.2.0`.

Owns the two places where a version is written, `version` in pyproject.toml and a heading of CHANGELOG.md, and what
belongs to a release: wheels that were run, a source distribution that was built without a network, and their digests,
all in dist/. Never commits, tags or uploads anything: that is for whoever looks at it. The same command again, with the
same version, builds it anew.

    python packaging/release.py VERSION
"""

from __future__ import annotations

import datetime
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
NEWER = "## [Unreleased]"


class ReleaseError(Exception):
    """Why there is no release."""


def main() -> int:
    """Cut the version and build it; the exit status."""
    if len(sys.argv) != 2:
        print("give one version: make release VERSION=0.2.0", file=sys.stderr)
        return 2
    try:
        name = cut(ROOT, sys.argv[1], datetime.datetime.now(datetime.timezone.utc).date())
        made = _build(ROOT / "dist", name)
    except ReleaseError as exc:
        print(f"no release: {exc}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as exc:
        print(f"no release: {' '.join(map(str, exc.cmd))} ended with status {exc.returncode}", file=sys.stderr)
        return 1
    for path in made:
        print(path.relative_to(ROOT))
    print(f"Mooli {name} is in dist/. Nothing is committed, tagged or published.")
    return 0


def cut(root: Path, name: str, day: datetime.date) -> str:
    """Write version `name` into the project below `root`, with what is unreleased as its changes; its name as packages
    have it. Raises ReleaseError where it is no version, is older than the present one, or brings no changes."""
    try:
        version = Version(name)
    except InvalidVersion:
        raise ReleaseError(f"{name!r} is no version: give one like 0.2.0") from None
    project, changes = root / "pyproject.toml", root / "CHANGELOG.md"
    found = re.search(r'^version = "([^"]+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ReleaseError(f'{project} has no line `version = "…"`')
    if version < Version(found[1]):
        raise ReleaseError(f"{version} is older than {found[1]}, which pyproject.toml has")
    text = changes.read_text(encoding="utf-8")
    if f"## [{version}]" not in text:
        before, heading, rest = text.partition(NEWER)
        unreleased, newest, older = rest.partition("\n## [")
        if not heading or not unreleased.strip():
            raise ReleaseError(f"CHANGELOG.md says nothing under {NEWER}: write there what is new in {version}")
        released = f"{NEWER}\n\n## [{version}] - {day.isoformat()}{unreleased.rstrip()}\n"
        changes.write_text(before + released + (newest and newest + older), encoding="utf-8")
    line = f'version = "{version}"'
    project.write_text(
        re.sub(r'^version = "[^"]+"$', line, project.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE),
        encoding="utf-8",
    )
    return str(version)


def _build(out: Path, name: str) -> list[Path]:
    out.mkdir(exist_ok=True)
    for old in [*out.glob("mooli-*.whl"), *out.glob("mooli-*.tar.gz"), *out.glob("SHA256SUMS")]:
        old.unlink()
    _python(str(ROOT / "packaging" / "wheels.py"), "--out", str(out))
    _python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(ROOT))
    made = [*sorted(out.glob(f"mooli-{name}-*.whl")), out / f"mooli-{name}.tar.gz"]
    _python(str(ROOT / "packaging" / "try_wheels.py"), *map(str, made[:-1]))
    with tempfile.TemporaryDirectory() as folder:
        # What building needs is here; whatever else it asked for would have to come from somewhere.
        build = ("-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
        _python(*build, "--wheel-dir", folder, str(made[-1]))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in made]
    (out / "SHA256SUMS").write_text("".join(lines))
    return [*made, out / "SHA256SUMS"]


def _python(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
