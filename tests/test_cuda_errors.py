"""The errors of csrc/common/check.h, in a program with CUDA calls of its own."""

import re
import subprocess

from emulator import build
from helpers import emulator_tools

ROOT = build.HERE.parent.parent
PROGRAM = """
#include "common/check.h"

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "what CUDA says"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int) {
  *prop = cudaDeviceProp{.name = "NVIDIA B200"};
  prop->major = 10;
  return cudaSuccess;
}

int main() {
  for (const cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorInsufficientDriver}) {
    try {
      FS_CUDA_CHECK(error);
    } catch (const std::runtime_error& caught) {
      puts(caught.what());
    }
  }
}
"""


def test_errors_name_what_the_build_is_for_and_the_driver_that_it_needs(tmp_path):
    with emulator_tools():
        compiler, include = build.compiler(), build.cuda_include()
    (tmp_path / "errors.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-isystem{include}"]
    flags += ["-DFASTSHARD_CUDA_ARCHS=8.0 8.6+PTX", str(tmp_path / "errors.cpp")]
    subprocess.run([compiler, *flags, "-o", str(tmp_path / "errors")], check=True)
    run = subprocess.run([tmp_path / "errors"], check=True, capture_output=True, text=True)
    no_kernel, old_driver = run.stdout.splitlines()
    assert no_kernel == (
        "fastshard: no kernel for NVIDIA B200 (compute capability 10.0); this build is compiled "
        "for 8.0 8.6+PTX. Install a wheel for this GPU, or build one with "
        'TORCH_CUDA_ARCH_LIST="10.0"'
    )
    api = (include / "cuda_runtime_api.h").read_text(errors="replace")
    major = int(re.search(r"define CUDART_VERSION +(\d+)", api)[1]) // 1000
    driver = {12: 525, 13: 580}[major]
    assert old_driver == (
        f"fastshard: what CUDA says (error): CUDA {major} needs an NVIDIA driver of version "
        f"{driver} or newer"
    )
