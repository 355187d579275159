"""Devices and seeds. Tests import the installed package, never the checkout.

The ``device`` fixture runs a test on up to three devices: ``cpu`` (the CPU reference), ``emulator``
(the CUDA kernel sources, compiled by g++, in place of the CPU reference) and ``cuda``.
"""

import os

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param("emulator", marks=pytest.mark.emulator),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


def skip_or_fail(variable: str, reason: str) -> None:
    """Skip the test, or fail it where the environment says that the device must be there."""
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    if request.param == "cuda" and not torch.cuda.is_available():
        skip_or_fail("FASTSHARD_REQUIRE_GPU", "there is no CUDA device")
    if request.param == "emulator":
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", "the emulator is not built")
    return torch.device(request.param)
