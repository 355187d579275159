"""Reading the profiler's events."""

from types import SimpleNamespace

from torch.autograd import DeviceType

from fastshard.profile import recorded


def event(name, *children, kernels=(), device=DeviceType.CPU):
    made = SimpleNamespace(
        name=name,
        cpu_children=list(children),
        cpu_parent=None,
        cpu_time_total=1.0,
        device_type=device,
        is_user_annotation=False,
        kernels=[SimpleNamespace(name=kernel, duration=2.0) for kernel in kernels],
    )
    for child in children:
        child.cpu_parent = made
    return made


def test_a_call_has_the_kernels_of_the_ops_within_it_once():
    """The loader's events of a first launch have the kernels of their op too."""
    inner = event("aten::copy_", event("cudaLaunchKernel", kernels=["copy"]), kernels=["copy"])
    loading = event("Lazy Function Loading", kernels=["step"])
    launch = event("cudaLaunchKernelExC", loading, kernels=["step"])
    op = event("aten::step", inner, launch, kernels=["step"])
    (call,) = recorded.read([op, inner, launch, loading]).calls
    assert call.op == "aten::step"
    assert [kernel.name for kernel in call.kernels] == ["step", "copy"]
