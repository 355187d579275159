"""Devices and seeds. Tests import the installed package, never the checkout.

The ``device`` fixture runs a test on up to three devices: ``cpu`` (the CPU reference), ``emulator``
(the CUDA kernel sources, compiled by g++, in place of the CPU reference) and ``cuda``.

A test on the emulator must call an emulated op: else it would prove nothing about the kernels.
Tests of argument errors, those that call ``pytest.raises``, need not.
"""

import os
import signal

import pytest
import torch

from emulator import runtime
from helpers import emulator_tools, skip_or_fail

DEVICES = [
    "cpu",
    pytest.param("emulator", marks=pytest.mark.emulator),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
NO_GPU = "there is no CUDA device"


def pytest_configure(config):
    """Share the cores among the workers of pytest-xdist; let tests and their processes be stopped.

    A shell that runs pytest in the background has it ignore Ctrl-C, which processes inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    if request.param == "cuda" and not torch.cuda.is_available():
        skip_or_fail("FASTSHARD_REQUIRE_GPU", NO_GPU)
    if request.param != "emulator":
        yield torch.device(request.param)
        return

    def missing(op: str) -> None:
        skip_or_fail("FASTSHARD_REQUIRE_EMULATOR", f"csrc has no kernel of {op} yet")

    with emulator_tools():
        kernels = runtime.kernels()
    with runtime.emulated(kernels, missing) as calls:
        yield torch.device("cpu")
    expects_errors = "raises" in request.function.__code__.co_names
    if not calls and not expects_errors:
        pytest.fail("the test called no emulated op")


def pytest_collection_modifyitems(config, items):
    too_large = [
        item
        for item in items
        if item.get_closest_marker("emulator") and item.get_closest_marker("large")
    ]
    if too_large:
        config.hook.pytest_deselected(items=too_large)
        items[:] = [item for item in items if item not in set(too_large)]


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} GPU tests were skipped: {NO_GPU}")
