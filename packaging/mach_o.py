"""What a module for macOS asks for and offers, read from its file on any system.

Owns the reading of one Mach-O file of 64 bits: load commands, the table of symbols, and where each symbol is looked for
as the file is loaded. Never runs or changes it. Source: Apple's <mach-o/loader.h> and <mach-o/nlist.h>.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAGIC = 0xFEEDFACF
ARM64 = 0x0100000C
LOAD_DYLIB, LOAD_WEAK_DYLIB, REEXPORT_DYLIB = 0xC, 0x80000018, 0x8000001F
SYMTAB, CODE_SIGNATURE, BUILD_VERSION, VERSION_MIN_MACOSX, DYLD_INFO_ONLY = 0x2, 0x1D, 0x32, 0x24, 0x80000022
STAB, EXTERNAL, TYPE = 0xE0, 0x01, 0x0E
FLAT_LOOKUP = -2


class MachOError(Exception):
    """Why a file is no module for macOS."""


@dataclass(slots=True)
class Library:
    """needs: libraries that are loaded with it. oldest_system: (major, minor) of macOS. exports: symbols that it
    offers. looked_up: those that it takes from whatever is loaded already. unbound: those that it looks for in itself
    and does not have."""

    path: Path
    needs: list[str] = field(default_factory=list)
    oldest_system: tuple[int, int] = (0, 0)
    is_signed: bool = False
    exports: set[str] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)
    unbound: set[str] = field(default_factory=set)


def read_library(path: Path) -> Library:
    """Raises MachOError for anything but a file of one processor, of Arm with 64 bits."""
    data = path.read_bytes()
    try:
        magic, processor, _, _, num_commands = struct.unpack_from("<5I", data)
        if magic != MAGIC or processor != ARM64:
            raise MachOError(f"{path} is not for macOS on Arm")
        return _read(path, data, num_commands)
    except (struct.error, ValueError, IndexError) as exc:
        raise MachOError(f"{path} is cut off, or no Mach-O file: {exc}") from exc


def _read(path: Path, data: bytes, num_commands: int) -> Library:
    library = Library(path)
    at = 32
    for _ in range(num_commands):
        command, num_bytes = struct.unpack_from("<2I", data, at)
        if command in (LOAD_DYLIB, LOAD_WEAK_DYLIB, REEXPORT_DYLIB):
            (offset,) = struct.unpack_from("<I", data, at + 8)
            library.needs.append(_text(data, at + offset))
        elif command in (BUILD_VERSION, VERSION_MIN_MACOSX):
            (version,) = struct.unpack_from("<I", data, at + (12 if command == BUILD_VERSION else 8))
            library.oldest_system = (version >> 16, version >> 8 & 0xFF)
        elif command == CODE_SIGNATURE:
            library.is_signed = True
        elif command == SYMTAB:
            first, count, names, _ = struct.unpack_from("<4I", data, at + 8)
            library.exports |= set(_exports(data, first, count, names))
        elif command == DYLD_INFO_ONLY:
            _, _, now, now_bytes, _, _, late, late_bytes = struct.unpack_from("<8I", data, at + 8)
            for name, where in [*_bound(data[now : now + now_bytes]), *_bound(data[late : late + late_bytes])]:
                if where == FLAT_LOOKUP:
                    library.looked_up.add(name)
                elif where == 0:
                    library.unbound.add(name)
        at += num_bytes
    library.unbound -= library.exports
    return library


def _exports(data: bytes, first: int, count: int, names: int) -> Iterator[str]:
    """Symbols that are defined here and seen outside."""
    for at in range(first, first + 16 * count, 16):
        name, kind, _, _, _ = struct.unpack_from("<IBBHQ", data, at)
        if kind & EXTERNAL and kind & TYPE and not kind & STAB:
            yield _text(data, names + name)


def _bound(program: bytes) -> Iterator[tuple[str, int]]:
    """The symbols that a program of the loader binds, each with the library it is looked for in: the number among those
    needed, 0 for the file itself, FLAT_LOOKUP for all that is loaded."""
    at, where, name = 0, 0, ""
    while at < len(program):
        step, value = program[at] & 0xF0, program[at] & 0x0F
        at += 1
        if step in (0x10, 0x30):  # a library by its number; or one of the special ones, which are negative
            where = value if step == 0x10 else value - 16 if value else 0
        elif step == 0x40:
            name = _text(program, at)
            at += len(name) + 1
        elif step in (0x90, 0xA0, 0xB0, 0xC0):
            yield name, where
        for _ in range({0x20: 1, 0x60: 1, 0x70: 1, 0x80: 1, 0xA0: 1, 0xC0: 2}.get(step, 0)):
            start = at
            while program[at] & 0x80:
                at += 1
            at += 1
            if step == 0x20:
                where = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(program[start:at]))


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
