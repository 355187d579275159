"""Check the machine code of a wheel, without a GPU.

    python .ci/check_machine_code.py fastshard-*.whl

Fails unless, by .ci/machine_code.toml,
- the library holds machine code and PTX for what the wheel says that it was compiled for, no more,
- no kernel uses local memory (a stack or spills), apart from the allow list, which gives a reason,
  and may bound the architectures and the bytes,
- no kernel has static shared memory: all of it is the SharedStorage struct that launch.cuh holds to
  101,376 bytes when compiling, and no source launches a kernel in another way,
- every kernel is compiled once for each architecture,
- every kernel that claims tensor cores has HMMA instructions of its own dtype, fp16 and bf16 both.

Needs cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

import argparse
import collections
import importlib.util
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
# How the two 16-bit types stand in a demangled kernel name, and in the tensor-core instruction.
HMMA_OF_TYPE = {"__half": r"HMMA\.16816\.F(16|32)$", "__nv_bfloat16": r"HMMA\.16816\.F32\.BF16$"}


def load_reader():
    """The checkout's module, by its path: the package around it may lack what it imports."""
    path = ROOT / "fastshard" / "bench" / "machine_code.py"
    spec = importlib.util.spec_from_file_location("machine_code", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


machine_code = load_reader()
Kernel = machine_code.Kernel


def check_images(cubins: set[str], ptx: set[str], archs: str) -> list[str]:
    """The library's images, like sm_86 and compute_86, are those of `archs`, like "8.0;8.6+PTX"."""
    wanted = set()
    for arch in archs.replace(".", "").split(";"):
        number, _, ptx_too = arch.partition("+")
        wanted |= {f"sm_{number}", f"compute_{number}"} if ptx_too else {f"sm_{number}"}
    found = cubins | ptx
    missing = [f"no code for {name}, of {archs}" for name in sorted(wanted - found)]
    return missing + [f"code for {name}, not of {archs}" for name in sorted(found - wanted)]


def read_images(library: str) -> tuple[set[str], set[str]]:
    cubins = set(re.findall(r"sm_\w+", machine_code.cuobjdump("--list-elf", library)))
    ptx = set(re.findall(r"sm_\w+|compute_\w+", machine_code.cuobjdump("--list-ptx", library)))
    return cubins, {name.replace("sm_", "compute_") for name in ptx}


def is_meant(kernel: Kernel, rule: dict) -> bool:
    """Whether a rule of the allow list is for the kernel; it names architectures, or is for all."""
    return re.search(rule["kernel"], kernel.name) and kernel.arch in rule.get(
        "archs", [kernel.arch]
    )


def may_use_local(kernel: Kernel, rule: dict) -> bool:
    return is_meant(kernel, rule) and kernel.stack <= rule.get("max_stack", kernel.stack)


def check_kernel(kernel: Kernel, rules: dict) -> list[str]:
    errors = []
    allowed = any(may_use_local(kernel, rule) for rule in rules.get("allow_local", []))
    if (kernel.stack or kernel.local_instructions) and not allowed:
        errors.append(
            f"{kernel.stack} bytes of stack, {kernel.local_instructions} local-memory instructions"
        )
    if kernel.static_shared:
        errors.append(f"{kernel.static_shared} bytes of static shared memory")
    if any(re.search(pattern, kernel.name) for pattern in rules["tensor_cores"]):
        types = [name for name in HMMA_OF_TYPE if f"<{name}" in kernel.name]
        if len(types) != 1 or not kernel.count(HMMA_OF_TYPE[types[0]]):
            errors.append("claims tensor cores, but has no HMMA of its own dtype")
    return errors


def check_compiled_once(kernels: list[Kernel]) -> list[str]:
    counts = collections.Counter((kernel.arch, kernel.name) for kernel in kernels)
    errors = [f"{arch} {name}: compiled {n} times" for (arch, name), n in counts.items() if n > 1]
    for arch in sorted({kernel.arch for kernel in kernels}):
        names = dict.fromkeys(kernel.name for kernel in kernels)
        errors += [f"{arch} {name}: not compiled" for name in names if (arch, name) not in counts]
    return errors


def check_rules_used(kernels: list[Kernel], rules: dict) -> list[str]:
    """A rule that matches nothing guards nothing; a tensor-core family has both dtypes."""
    archs = {kernel.arch for kernel in kernels}
    errors = [
        f"allow_local rule {rule['kernel']!r} matches no kernel"
        for rule in rules.get("allow_local", [])
        if archs & set(rule.get("archs", archs))
        and not any(is_meant(kernel, rule) for kernel in kernels)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel")
    wheel = parser.parse_args().wheel
    rules = tomllib.loads((ROOT / ".ci" / "machine_code.toml").read_text())
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fastshard/_C.abi3.so", folder)
        record = archive.read("fastshard/_build_info.py").decode()
        (archs,) = re.findall(r"^CUDA_ARCHS = '(.+)'$", record, re.M)
        errors = check_images(*read_images(library), archs) + check_sources(ROOT / "csrc")
        kernels = machine_code.read_kernels(library)
    errors += check_rules_used(kernels, rules) + check_compiled_once(kernels)
    print("\n".join(machine_code.table([kernel.to_dict() for kernel in kernels])))
    for kernel in kernels:
        errors += [f"{kernel.arch} {kernel.name}: {error}" for error in check_kernel(kernel, rules)]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(errors)} errors")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
