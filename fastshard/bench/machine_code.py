"""The machine code of a compiled library, read without a GPU: what each kernel takes.

``cuobjdump`` and ``nvdisasm`` give registers and instructions. Threads and shared memory are in the
code object: the launch bounds, and the constants by which ``FS_SHARED_STORAGE`` and
``FS_EXTRA_SHARED_BYTES`` of csrc/common/launch.cuh record what a launch asks for. The occupancy
follows from these. Needs the standard library alone: .ci/check_machine_code.py runs it by itself.
"""

import collections
import ctypes
import math
import os
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ALLOCATED_REGISTERS = 256  # a warp takes registers in such units
RESERVED_SHARED_BYTES = 1024  # of every block, by the system
SHORT_NAMES = {
    "__nv_bfloat16": "bf16",
    "__half": "fp16",
    "(AttentionRules)0": "kRanges",
    "(AttentionRules)1": "kMaskBytes",
    "(AttentionRules)2": "kMaskValues",
    "(AttentionRules)3": "kAll",
}
CONFIGS = {
    "ActAndMulConfig": "T, VecSize",
    "AttentionConfig": "HeadDim, RowWarps, RowTiles, KeyWarps, WarpKeys, MinBlocks, "
    "QueryInRegisters, Rules",
    "DecodeAttentionConfig": "HeadDim, Rows, Plain",
    "DecodeConfig": "HeadDim, Group, IsShared",
    "GemmConfig": "RowWarps, ColumnWarps, WarpRows, WarpColumns, Depth, Stages, MinBlocks",
    "RopeConfig": "T, VecSize",
    "RowConfig": "ThreadsPerRow, RowsPerBlock, VecsPerThread",
    "SampleConfig": "Threads, Capacity",
}
"""What the numbers of a configuration are, in the order in which a kernel's name has them."""
HEADER = (
    f"{'threads':>7} {'registers':>9} {'shared KB':>9} {'blocks':>6} {'occupancy':>9} {'stack':>5} "
    f"{'spills':>6} {'instr.':>6} {'HMMA':>4} {'share':>5} {'in loop':>7}  kernel"
)
NOTE = (
    "blocks: that a multiprocessor holds; occupancy: warps of those, of the most it can have; "
    "spills: instructions on local memory; share: of HMMA in all instructions; in loop: in those "
    "of the loop that has most of them"
)


@dataclass(frozen=True)
class Multiprocessor:
    """What one holds (CUDA C++ Programming Guide, technical specifications).

    Attributes:
        warps: Most resident warps.
        blocks: Most resident blocks.
        shared_bytes: Of all blocks, with what the system reserves.
        registers: Of all threads.
    """

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024),
    "sm_86": Multiprocessor(48, 16, 100 * 1024),
    "sm_89": Multiprocessor(48, 24, 100 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024),
    "sm_90a": Multiprocessor(64, 32, 228 * 1024),
}


@dataclass
class Kernel:
    """One kernel for one architecture.

    Attributes:
        name: Demangled.
        arch: As ``sm_86``.
        registers: Of a thread.
        stack: Bytes of a thread.
        static_shared: Bytes of a block that are no part of ``shared``.
        instructions: How many of each, by its full name.
        loop: The same of the loop that has most tensor-core instructions; empty without any.
        threads: Of a block, by its launch bounds; None without.
        shared: Bytes of a block, that a launch asks for.
    """

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    static_shared: int = 0
    instructions: collections.Counter = field(default_factory=collections.Counter)
    loop: collections.Counter = field(default_factory=collections.Counter)
    threads: int | None = None
    shared: int = 0

    def count(self, pattern: str) -> int:
        """Instructions whose name the regular expression matches from its beginning on."""
        return _count(self.instructions, pattern)

    @property
    def local_instructions(self) -> int:
        return self.count("LDL") + self.count("STL")

    @property
    def short_name(self) -> str:
        """Without the namespace and the parameters, types as in ``SHORT_NAMES``."""
        name = self.name.removeprefix("void ").replace("fastshard::", "")
        for long, short in SHORT_NAMES.items():
            name = name.replace(long, short)
        depth = 0
        for i, character in enumerate(name):  # the parameters begin outside of all brackets
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                name = name[:i]
                break
        return name.replace("> >", ">>").replace("> >", ">>")

    def blocks(self) -> int | None:
        """That a multiprocessor holds; None where the architecture or the threads are unknown."""
        limit = MULTIPROCESSORS.get(self.arch)
        if limit is None or self.threads is None:
            return None
        warps = math.ceil(self.threads / 32)
        of_warp = math.ceil(self.registers * 32 / ALLOCATED_REGISTERS) * ALLOCATED_REGISTERS
        # the four parts of a multiprocessor have a quarter of the registers each
        warps_by_registers = limit.registers // 4 // of_warp * 4
        shared = math.ceil((self.shared + self.static_shared) / 128) * 128 + RESERVED_SHARED_BYTES
        return min(
            limit.blocks,
            limit.warps // warps,
            warps_by_registers // warps,
            limit.shared_bytes // shared,
        )

    def occupancy(self) -> float | None:
        """Resident warps, of the most that a multiprocessor can have; None as for ``blocks``."""
        blocks = self.blocks()
        if blocks is None:
            return None
        return blocks * math.ceil(self.threads / 32) / MULTIPROCESSORS[self.arch].warps

    def to_dict(self) -> dict:
        """Plain values, what is derived included."""
        num_instructions, num_hmma = self.instructions.total(), self.count("HMMA")
        return {
            "kernel": self.short_name,
            "arch": self.arch,
            "threads": self.threads,
            "registers": self.registers,
            "shared_bytes": self.shared + self.static_shared,
            "blocks_per_multiprocessor": self.blocks(),
            "occupancy": self.occupancy(),
            "stack_bytes": self.stack,
            "spill_instructions": self.local_instructions,
            "instructions": num_instructions,
            "hmma": num_hmma,
            "hmma_share": num_hmma / max(num_instructions, 1),
            "hmma_share_of_loop": _count(self.loop, "HMMA") / max(self.loop.total(), 1),
        }


def text(facts: dict) -> str:
    """One line of ``Kernel.to_dict``, aligned with ``HEADER``."""
    occupancy, has_hmma = facts["occupancy"], facts["hmma"] > 0
    return (
        f"{_or_dash(facts['threads']):>7} {facts['registers']:>9} "
        f"{facts['shared_bytes'] / 1024:>9.1f} {_or_dash(facts['blocks_per_multiprocessor']):>6} "
        f"{'-' if occupancy is None else f'{occupancy:.0%}':>9} {facts['stack_bytes']:>5} "
        f"{facts['spill_instructions']:>6} {facts['instructions']:>6} "
        f"{facts['hmma'] if has_hmma else '-':>4} "
        f"{_percent(facts['hmma_share'], has_hmma):>5} "
        f"{_percent(facts['hmma_share_of_loop'], has_hmma):>7}  {facts['kernel']}"
    )


def table(kernels: Sequence[dict]) -> list[str]:
    """Lines for ``Kernel.to_dict`` of kernels: a heading for each architecture, and a legend."""
    lines = []
    for arch in sorted({kernel["arch"] for kernel in kernels}):
        lines += [f"machine code for {arch}", HEADER]
        lines += [text(kernel) for kernel in kernels if kernel["arch"] == arch]
    names = " ".join(kernel["kernel"] for kernel in kernels)
    lines += [f"{config}: {fields}" for config, fields in CONFIGS.items() if f" {config}<" in names]
    return [*lines, NOTE] if lines else []


def read_kernels(
    library: Path, is_wanted: Callable[[Kernel], bool] = lambda kernel: True
) -> list[Kernel]:
    """The kernels of a library's code objects that are wanted by their names, in order of those.

    Raises:
        RuntimeError: a tool is missing.
        OSError, subprocess.SubprocessError: it or the library does not work.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", "all", str(Path(library).resolve()), cwd=folder)
        for path in sorted(Path(folder).iterdir()):
            kernels = dict(_kernels_of(path.read_bytes(), path.suffixes[-2][1:]))
            wanted = [kernel for kernel in kernels.values() if is_wanted(kernel)]
            if wanted:
                _read_usage(kernels, cuobjdump("-res-usage", str(path)))
                _read_instructions(kernels, cuobjdump("-sass", str(path)))
                found += wanted
    return sorted(found, key=lambda kernel: (kernel.arch, _natural(kernel.short_name)))


def cuobjdump(*arguments: str, cwd: str | None = None) -> str:
    """What the tool prints.

    Raises:
        RuntimeError: it, or ``nvdisasm``, which it calls, is in none of the usual places.
        OSError, subprocess.SubprocessError: it fails.
    """
    folder = next(filter(_has_tools, _tool_folders()), None)
    if folder is None:
        raise RuntimeError(
            "cuobjdump and nvdisasm not found; "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or set CUDA_HOME"
        )
    environment = dict(os.environ, PATH=f"{folder}:{os.environ.get('PATH', '')}")
    command = [str(folder / "cuobjdump"), *arguments]
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=cwd
    )
    return run.stdout


def _tool_folders() -> Iterator[Path]:
    """Packages of NVIDIA's, the toolkit, the search path, and Triton, which brings its own."""
    packages = Path(sysconfig.get_path("purelib"))
    yield packages / "nvidia" / "cu13" / "bin"
    yield Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    on_path = shutil.which("cuobjdump")
    if on_path:
        yield Path(on_path).parent
    yield packages / "triton" / "backends" / "nvidia" / "bin"


def _has_tools(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("cuobjdump", "nvdisasm"))


def _kernels_of(elf: bytes, arch: str) -> Iterator[tuple[str, Kernel]]:
    """Mangled names and kernels of a code object, with their threads and shared memory."""
    sections = _sections(elf)
    constants = _recorded_constants(elf, sections)
    for section in sections:
        if section.name.startswith(".text."):
            mangled = section.name.removeprefix(".text.")
            scope = f"_ZZ{mangled[2:]}E"
            shared = sum(constants.get(scope + name, 0) for name in _RECORDED)
            info = next((s for s in sections if s.name == f".nv.info.{mangled}"), None)
            threads = None if info is None else _threads(elf[info.begin : info.end])
            kernel = Kernel(_demangle(mangled), arch, threads=threads, shared=shared)
            yield mangled, kernel


_RECORDED = ("16fs_storage_bytes", "14fs_extra_bytes")  # mangled, inside a kernel's scope


@dataclass(frozen=True)
class _Section:
    name: str
    begin: int
    end: int
    link: int


def _sections(elf: bytes) -> list[_Section]:
    """Of a 64-bit little-endian ELF file."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQI", elf, offset + i * size) for i in range(number)]
    names_at = headers[names][4]
    return [
        _Section(_string(elf, names_at + name), begin, begin + length, link)
        for name, _, _, _, begin, length, link in headers
    ]


def _recorded_constants(elf: bytes, sections: list[_Section]) -> dict[str, int]:
    """Value of every constant in ``_RECORDED``, by its mangled name."""
    (table,) = [section for section in sections if section.name == ".symtab"]
    found = {}
    for at in range(table.begin, table.end, 24):
        name_at, _, _, index, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
        name = _string(elf, sections[table.link].begin + name_at)
        if name.endswith(_RECORDED):
            (found[name],) = struct.unpack_from("<i", elf, sections[index].begin + value)
    return found


def _threads(info: bytes) -> int | None:
    """Of the launch bounds, from a kernel's ``.nv.info``: a list of (format, name, size, value)."""
    with_value, max_threads = 4, 5
    at = 0
    while at + 4 <= len(info):
        layout, name, size = struct.unpack_from("<BBH", info, at)
        if layout == with_value and name == max_threads:
            return math.prod(struct.unpack_from("<3I", info, at + 4))
        at += 4 + (size if layout == with_value else 0)
    return None


def _string(elf: bytes, at: int) -> str:
    return elf[at : elf.index(0, at)].decode()


def _read_usage(kernels: dict[str, Kernel], text: str) -> None:
    for name, usage in re.findall(r"Function (\S+):\n\s*(REG:.*)", text):
        values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        kernel = kernels[name]
        kernel.registers, kernel.stack = values["REG"], values["STACK"]
        kernel.static_shared = values.get("SHARED", 0)
        if int(re.match(r"sm_(\d+)", kernel.arch)[1]) >= 90:  # what the system reserves is in it
            kernel.static_shared = max(kernel.static_shared - RESERVED_SHARED_BYTES, 0)


def _read_instructions(kernels: dict[str, Kernel], text: str) -> None:
    pattern = r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)"
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        mangled, *lines = function.split("\n")
        code = [match.groups() for match in map(re.compile(pattern).match, lines) if match]
        kernel = kernels[mangled.strip()]
        kernel.instructions.update(name for _, name, _ in code)
        kernel.loop = _tensor_core_loop(code)


def _tensor_core_loop(code: list[tuple[str, str, str]]) -> collections.Counter:
    """Instructions of the loop with most of HMMA, of such the shortest; (address, name, operands).

    A loop is what lies between a branch to an earlier address and that address.
    """
    index_of = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
    best = collections.Counter()
    for i, (_, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        begin = index_of.get(int(target[1], 16), i) if target else i
        if begin < i:
            loop = collections.Counter(name for _, name, _ in code[begin : i + 1])
            key = (_count(loop, "HMMA"), -loop.total())
            if key[0] and (not best or key > (_count(best, "HMMA"), -best.total())):
                best = loop
    return best


def _count(instructions: collections.Counter, pattern: str) -> int:
    return sum(n for name, n in instructions.items() if re.match(pattern, name))


def _demangle(name: str) -> str:
    """By the C++ run-time library, which torch needs too; ``name`` itself where there is none."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return name
    demangle.restype = ctypes.c_void_p
    demangle.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    found = demangle(name.encode(), None, None, None)
    if not found:
        return name
    text = ctypes.string_at(found).decode()
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(found)
    return text


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _percent(share: float, is_known: bool) -> str:
    return f"{share:.0%}" if is_known else "-"
