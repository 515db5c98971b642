#!/usr/bin/env python3
"""Looks into the Mach-O files that tools/check-macos builds. Prints `name<tab>value` lines, or one error and exits 1.

    macho.py OLDEST PROGRAM BRIDGE LINKED LIBMLX

OLDEST is the oldest macOS that they must ask for, PROGRAM the `zmlx` program, BRIDGE the bridge as it is embedded (MLX's
symbols are looked up when it is loaded), LINKED the same objects linked against LIBMLX, the official library.
Layout of the structures: <mach-o/loader.h> and <mach-o/nlist.h>.
"""

import struct
import sys

MAGIC_64, CPU_ARM64, PLATFORM_MACOS = 0xFEEDFACF, 0x0100000C, 1
MH_EXECUTE, MH_DYLIB = 2, 6
LC_SYMTAB, LC_CODE_SIGNATURE, LC_BUILD_VERSION, LC_RPATH = 0x2, 0x1D, 0x32, 0x8000001C
LC_ID_DYLIB = 0xD
# Ordinary, weak, re-exported, upward and lazy: the order gives each its number in the symbols that name it.
LC_LOADS = {0xC, 0x80000018, 0x8000001F, 0x80000023, 0x20}
N_STAB, N_PRIVATE, N_TYPE, N_EXTERNAL = 0xE0, 0x10, 0x0E, 0x01
# The library of a symbol that no library is named for: 0xFE from Apple's linker, 0 from others.
LOOKED_UP_EVERYWHERE = {0xFE, 0}
SYSTEM_FOLDERS = ("/usr/lib/", "/System/Library/")


class Bad(Exception):
    """What is wrong with a file, for people to read."""


def text_at(data, offset):
    end = data.find(b"\0", offset)
    if end < 0:
        raise Bad("a text has no end")
    return data[offset:end].decode("utf-8", "replace")


class MachO:
    """One file: its load commands and symbols."""

    def __init__(self, path):
        self.path = path
        self.platform = self.oldest = self.id = None
        self.loads, self.rpaths, self.undefined, self.exported = [], [], {}, set()
        self.signed = False
        with open(path, "rb") as file:
            data = file.read()
        try:
            self.read(data)
        except struct.error as error:
            raise Bad(f"{path} is cut short: {error}") from error

    def read(self, data):
        magic, cpu, _, self.kind, count, _, _, _ = struct.unpack_from("<8I", data)
        if magic != MAGIC_64 or cpu != CPU_ARM64:
            raise Bad(f"{self.path} is not a Mach-O file for arm64 (magic {magic:#x}, processor {cpu:#x})")
        at, symtab = 32, None
        for _ in range(count):
            command, size = struct.unpack_from("<2I", data, at)
            if size < 8:
                raise Bad(f"{self.path} has a load command of {size} bytes")
            if command in LC_LOADS or command in (LC_ID_DYLIB, LC_RPATH):
                name = text_at(data, at + struct.unpack_from("<I", data, at + 8)[0])
                if command == LC_ID_DYLIB:
                    self.id = name
                elif command == LC_RPATH:
                    self.rpaths.append(name)
                else:
                    self.loads.append(name)
            elif command == LC_BUILD_VERSION:
                self.platform, oldest = struct.unpack_from("<2I", data, at + 8)
                self.oldest = f"{oldest >> 16}.{oldest >> 8 & 0xFF}"
            elif command == LC_SYMTAB:
                symtab = struct.unpack_from("<4I", data, at + 8)
            elif command == LC_CODE_SIGNATURE:
                self.signed = True
            at += size
        if symtab is None:
            raise Bad(f"{self.path} has no symbol table")
        offset, number, strings, _ = symtab
        for i in range(number):
            name, kind, _, description, _ = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
            if kind & N_STAB or not kind & N_EXTERNAL:
                continue
            if kind & N_TYPE:
                if not kind & N_PRIVATE:
                    self.exported.add(text_at(data, strings + name))
            else:
                self.undefined[text_at(data, strings + name)] = description >> 8

    def check(self, kind, word, oldest):
        if self.kind != kind:
            raise Bad(f"{self.path} is not a {word} (file type {self.kind})")
        if self.platform != PLATFORM_MACOS or self.oldest != oldest:
            raise Bad(f"{self.path} asks for platform {self.platform}, system {self.oldest}, not macOS {oldest}")
        if not self.signed:
            raise Bad(f"{self.path} has no code signature: Apple silicon ends programs without one")
        for name in self.loads:
            if not name.startswith(SYSTEM_FOLDERS) and not name.startswith("@rpath/libmlx"):
                raise Bad(f"{self.path} loads {name}, which is not part of macOS")

    def from_libraries(self, libraries):
        """The symbols it takes from those of its libraries that are in `libraries`."""
        numbers = {i for i, name in enumerate(self.loads, 1) if name in libraries}
        return {name for name, number in self.undefined.items() if number in numbers}


def of_mlx(symbols):
    """Those in the namespace mlx::core, virtual tables and type descriptions too."""
    return {name for name in symbols if name.startswith("__Z") and "3mlx4core" in name}


def some(symbols):
    shown = sorted(symbols)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def check(oldest, program, bridge, linked, mlx):
    program.check(MH_EXECUTE, "program", oldest)
    bridge.check(MH_DYLIB, "dynamic library", oldest)
    linked.check(MH_DYLIB, "dynamic library", oldest)
    if mlx.kind != MH_DYLIB or mlx.id != "@rpath/libmlx.dylib":
        raise Bad(f"{mlx.path} is not the expected library: its install name is {mlx.id}")
    # A path of libmlx in either would tie them to one installation: the program opens the one that it finds.
    for file in (program, bridge):
        if any("mlx" in name for name in file.loads) or file.rpaths:
            raise Bad(f"{file.path} must not name libmlx or an rpath: {file.loads + file.rpaths}")
    if bridge.id != "@rpath/zmlx_bridge.dylib":
        raise Bad(f"{bridge.path} has the install name {bridge.id}, which names the machine that built it")
    everywhere = {name for name, number in program.undefined.items() if number in LOOKED_UP_EVERYWHERE}
    if everywhere:
        raise Bad(f"{program.path} has undefined symbols: {some(everywhere)}")
    if "_zmlx_bridge_api" not in bridge.exported:
        raise Bad(f"{bridge.path} does not export zmlx_bridge_api")

    looked_up = {name for name, number in bridge.undefined.items() if number in LOOKED_UP_EVERYWHERE}
    missing = looked_up - mlx.exported
    if missing:
        raise Bad(f"the bridge uses {len(missing)} symbols that libmlx.dylib does not export: {some(missing)}")
    bound = linked.from_libraries({mlx.id})
    if bound != looked_up:
        raise Bad(f"linked and loaded bridge disagree about libmlx's symbols: {some(bound ^ looked_up)}")
    used = of_mlx(looked_up)
    if not used:
        raise Bad(f"{bridge.path} uses no symbol of mlx::core: that can't be")
    return [
        ("format", "Mach-O arm64 (program, bridge), signed"),
        ("oldest macOS", f"{program.oldest} (program), {bridge.oldest} (bridge), {mlx.oldest} (libmlx)"),
        ("mlx::core symbols", f"{len(used)} used, {len(used & mlx.exported)} exported by libmlx.dylib"),
        ("undefined symbols", f"{len(missing)}"),
        ("libraries of zmlx", " ".join(program.loads)),
        ("libraries of bridge", " ".join(bridge.loads)),
        ("install names", f"{bridge.id}, {mlx.id}"),
        ("rpaths", "none, none needed: libmlx is opened by its path, the bridge after it"),
    ]


def main(arguments):
    if len(arguments) != 5:
        raise Bad("usage: macho.py OLDEST PROGRAM BRIDGE LINKED LIBMLX")
    for name, value in check(arguments[0], *(MachO(path) for path in arguments[1:])):
        print(f"{name}\t{value}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Bad, OSError) as error:
        sys.exit(f"{error}")
