"""Check the machine code of a wheel, without a GPU.

    python .ci/check_machine_code.py fastshard-*.whl

Fails unless, by .ci/machine_code.toml,
- the library holds a cubin for each `required_cubins` and PTX for each `required_ptx`,
- no kernel uses local memory (a stack or spills), apart from the allow list, which gives a reason,
- no kernel has static shared memory: all of it is the SharedStorage struct that launch.cuh holds to
  101,376 bytes when compiling, and no source launches a kernel in another way,
- every kernel that claims tensor cores has HMMA instructions of its own dtype, fp16 and bf16 both.

Needs cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) and c++filt.
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
TOOL_FOLDERS = [
    Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin",
    Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin",
]
# How the two 16-bit types stand in a demangled kernel name, and in the tensor-core instruction.
HMMA_OF_TYPE = {"__half": r"HMMA\.16816\.F32$", "__nv_bfloat16": r"HMMA\.16816\.F32\.BF16$"}


@dataclass
class Kernel:
    name: str  # demangled
    arch: str
    registers: int = 0
    stack: int = 0
    static_shared: int = 0
    instructions: collections.Counter = field(default_factory=collections.Counter)

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def cuobjdump(*arguments: str) -> str:
    folder = next((f for f in TOOL_FOLDERS if (f / "cuobjdump").exists()), None)
    if folder is None:
        sys.exit("cuobjdump not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}")  # it calls nvdisasm
    command = [str(folder / "cuobjdump"), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def read_kernels(library: str) -> list[Kernel]:
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = name = ""
    for line in cuobjdump("-res-usage", library).splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernels[name, arch] = Kernel(
                name, arch, usage["REG"], usage["STACK"], usage.get("SHARED", 0)
            )
    for line in cuobjdump("-sass", library).splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            kernels[name, arch].instructions[match[1]] += 1
    mangled = "\n".join(kernel.name for kernel in kernels.values())
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True)
    for kernel, demangled in zip(kernels.values(), names.stdout.splitlines(), strict=True):
        kernel.name = demangled
    return sorted(kernels.values(), key=lambda kernel: (kernel.arch, kernel.name))


def check_images(library: str, rules: dict) -> list[str]:
    """The architectures that the library was asked to hold."""
    cubins = set(re.findall(r"sm_\w+", cuobjdump("--list-elf", library)))
    ptx = set(re.findall(r"sm_\w+|compute_\w+", cuobjdump("--list-ptx", library)))
    ptx = {name.replace("sm_", "compute_") for name in ptx}
    missing = [f"no {name} machine code" for name in rules["required_cubins"] if name not in cubins]
    return missing + [f"no {name} PTX" for name in rules["required_ptx"] if name not in ptx]


def check_kernel(kernel: Kernel, rules: dict) -> list[str]:
    errors = []
    spills = kernel.count("LDL") + kernel.count("STL")
    allowed = any(re.search(rule["kernel"], kernel.name) for rule in rules.get("allow_local", []))
    if (kernel.stack or spills) and not allowed:
        errors.append(f"{kernel.stack} bytes of stack, {spills} local-memory instructions")
    if kernel.static_shared:
        errors.append(f"{kernel.static_shared} bytes of static shared memory")
    if any(re.search(pattern, kernel.name) for pattern in rules["tensor_cores"]):
        types = [name for name in HMMA_OF_TYPE if f"<{name}" in kernel.name]
        if len(types) != 1 or not kernel.count(HMMA_OF_TYPE[types[0]]):
            errors.append("claims tensor cores, but has no HMMA of its own dtype")
    return errors


def check_rules_used(kernels: list[Kernel], rules: dict) -> list[str]:
    """A rule that matches nothing guards nothing; a tensor-core family has both dtypes."""
    errors = [
        f"allow_local rule {rule['kernel']!r} matches no kernel"
        for rule in rules.get("allow_local", [])
        if not any(re.search(rule["kernel"], kernel.name) for kernel in kernels)
    ]
    for pattern in rules["tensor_cores"]:
        for name in HMMA_OF_TYPE:
            if not any(re.search(pattern, k.name) and f"<{name}" in k.name for k in kernels):
                errors.append(f"tensor_cores {pattern!r} has no kernel for {name}")
    return errors


def check_sources(sources: Path) -> list[str]:
    """Kernels are launched, and shared memory is declared, in common/launch.cuh alone."""
    errors = []
    for path in sorted(sources.rglob("*.cu*")):
        if path.name == "launch.cuh":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"<<<|cudaLaunch\w*Kernel|\b__shared__\b", line.split("//")[0]):
                errors.append(f"{path}:{number}: only launch.cuh may: {line.strip()}")
    return errors


def describe(kernel: Kernel) -> str:
    return (
        f"{kernel.arch} registers {kernel.registers:3} stack {kernel.stack:3} "
        f"local {kernel.count('LDL') + kernel.count('STL'):2} HMMA {kernel.count('HMMA'):4} "
        f"LDSM {kernel.count('LDSM'):3} LDGSTS {kernel.count('LDGSTS'):3} {kernel.name[:110]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel")
    wheel = parser.parse_args().wheel
    rules = tomllib.loads((ROOT / ".ci" / "machine_code.toml").read_text())
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fastshard/_C.abi3.so", folder)
        errors = check_images(library, rules) + check_sources(ROOT / "csrc")
        kernels = read_kernels(library)
    errors += check_rules_used(kernels, rules)
    for kernel in kernels:
        print(describe(kernel))
        errors += [f"{kernel.arch} {kernel.name}: {error}" for error in check_kernel(kernel, rules)]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(errors)} errors")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
