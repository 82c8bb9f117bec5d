"""Pythons that are not installed here, from Debian's packages: their headers, or all that runs them.

Owns an APT of its own below a folder, which neither root nor this system's packages have to do with. Never installs
anything: packages are unpacked, and their scripts are not run. Needs `apt-get` and `dpkg-deb`, of Debian or Ubuntu.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

MIRROR = "http://deb.debian.org/debian"
SUITES = {"3.11": "bookworm", "3.13": "trixie"}
"""Python's version to the release of Debian that has it."""


class MissingPackageError(Exception):
    """What was not there, and what to do."""


class Debian:
    """The packages of one release for one architecture ("amd64", "arm64"), kept below `folder`."""

    def __init__(self, folder: Path, python: str, architecture: str) -> None:
        if python not in SUITES:
            raise MissingPackageError(f"Debian has no Python {python}: {', '.join(SUITES)}")
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise MissingPackageError("apt-get or dpkg-deb is not here: this is neither Debian nor Ubuntu")
        self.root = folder / f"{SUITES[python]}-{architecture}"
        self._apt = self.root / "apt"
        self._architecture = architecture
        self._suite = SUITES[python]

    def unpack(self, *packages: str, alone: bool = False) -> Path:
        """A folder like `/` with these packages and, unless `alone`, all that they depend on.

        Raises MissingPackageError with what APT said.
        """
        system = self.root / ("files-alone" if alone else "files")
        done = system / f".{'-'.join(packages)}"
        if done.exists():
            return system
        self._update()
        archives = self._apt / "cache" / "archives"
        if alone:
            self._run("download", *packages, folder=archives)
        else:
            self._run("install", "--download-only", "--yes", "--no-install-recommends", *packages, folder=archives)
        for package in sorted(archives.glob("*.deb")):
            system.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", str(package), str(system)], check=True)
            package.unlink()
        done.touch()
        return system

    def _update(self) -> None:
        if (self._apt / "sources.list").exists():
            return
        for name in ("state/lists/partial", "cache/archives/partial", "preferences", "parts"):
            (self._apt / name).mkdir(parents=True, exist_ok=True)
        (self._apt / "status").touch()
        (self._apt / "new.list").write_text(
            f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {MIRROR} {self._suite} main\n"
        )
        (self._apt / "new.list").rename(self._apt / "sources.list")
        try:
            self._run("update", folder=self._apt)
        except MissingPackageError:
            (self._apt / "sources.list").unlink()
            raise

    def _run(self, *words: str, folder: Path) -> None:
        apt = self._apt.resolve()
        settings = {
            "APT::Architecture": self._architecture,
            "APT::Architectures": self._architecture,
            "APT::Sandbox::User": "root",
            "Dir::State": str(apt / "state"),
            "Dir::State::status": str(apt / "status"),
            "Dir::Cache": str(apt / "cache"),
            "Dir::Etc::sourcelist": str(apt / "sources.list"),
            "Dir::Etc::sourceparts": str(apt / "parts"),
            "Dir::Etc::preferencesparts": str(apt / "preferences"),
            "Debug::NoLocking": "true",
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        command = ["apt-get", "-qq", *options, *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise MissingPackageError(f"apt-get {' '.join(words)}: {done.stderr.strip()[-2000:]}")


def interpreter(folder: Path, python: str, architecture: str, emulator: Sequence[str] = ()) -> list[str]:
    """The words that run this Python, which is unpacked below `folder`, with the C library of its release.

    emulator: the program that runs its architecture, where that is not the machine's.
    """
    # Other packages' wheels have C++'s library from the system, as manylinux allows.
    packages = (f"python{python}-minimal", f"libpython{python}-stdlib", "libstdc++6")
    system = Debian(folder, python, architecture).unpack(*packages)
    for name in ("lib", "lib64"):  # links to what is below /usr, which no package of these brings
        if (system / "usr" / name).exists() and not (system / name).exists():
            (system / name).symlink_to(Path("usr") / name)
    program = system / "usr" / "bin" / f"python{python}"
    if emulator:
        return [*emulator, "-L", str(system), str(program)]
    machine = {"amd64": "x86_64", "arm64": "aarch64"}[architecture]
    loader = next(path for path in system.rglob(f"ld-linux-{machine.replace('_', '-')}.so.*"))
    libraries = [system / place / f"{machine}-linux-gnu" for place in ("lib", "usr/lib")]
    return [str(loader), "--library-path", ":".join(map(str, libraries)), str(program)]
