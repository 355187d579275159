"""The two ways to ask SDPA for grouped heads give what float64 gives."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from fastshard.bench.attention import _golden, _sdpa
from fastshard.bench.timing import relative_error


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_both_forms_are_grouped_attention(backend, num_kv_heads):
    torch.manual_seed(0)
    q = torch.randn(2, 3, 6, 16)  # sets, batch, heads, head_dim
    k, v = torch.randn(2, 2, 3, num_kv_heads, 40, 16)
    for call in _sdpa(q, k, v, backend):
        for i in range(2):
            golden = _golden(q[i], k[i], v[i])
            assert golden.dtype == torch.float64
            assert relative_error(call(i), golden) < 1e-6


def test_golden_by_hand():
    q = torch.tensor([[[2.0, 0, 0, 0], [0, 2.0, 0, 0]]])  # one row, two heads of one group
    k = torch.eye(4)[None, None, :2] * 4  # scores 2 * 4 / sqrt(4) = 4 for the head's own key
    v = torch.tensor([[[[1.0, 0, 0, 0], [0, 0, 0, 1.0]]]])
    high = torch.tensor(4.0, dtype=torch.float64).sigmoid().item()
    expected = [[[high, 0, 0, 1 - high], [1 - high, 0, 0, high]]]
    torch.testing.assert_close(_golden(q, k, v), torch.tensor(expected, dtype=torch.float64))
