"""A prompt: its largest tensor; on a GPU its memory, that nothing waits for it, its capture."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastshard import Shard, ShardedGeneralModel
from fastshard.bench.timing import peak_bytes
from helpers import CUDA_ONLY

CONFIG = {
    "vocab_size": 96,
    "embed_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 64,
    "max_seq_len": 8192,
    "rope_base": 10000,
    "rope_scaling_factor": 1.0,
    "intermediate_dim": 512,
    "num_layers": 3,
    "norm_eps": 1e-5,
    "attn_dropout": 0.0,
}


def build(device) -> ShardedGeneralModel:
    torch.manual_seed(0)
    shard = Shard("llama", 0, 2, 3)
    return ShardedGeneralModel(CONFIG, shard, device, torch.float16, use_cache=True)


def random_tokens(device, *shape):
    return torch.randint(0, CONFIG["vocab_size"], shape, device=device)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an op gives, views of older ones too."""

    elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("chunk_size", [4096, 8192])
def test_no_tensor_of_tokens_by_keys(chunk_size, is_padded):
    """Of one chunk and of a second one, whose keys are all; on meta, which computes nothing."""
    model, num_tokens = build("meta"), CONFIG["max_seq_len"]
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    first_key = torch.zeros(1, dtype=torch.int64, device="meta") if is_padded else None
    model.model.setup_caches(1, torch.float16, decoder_max_seq_len=num_tokens)
    with LargestTensor() as largest:
        for start in range(0, num_tokens, chunk_size):
            chunk = tokens[:, start : start + chunk_size]
            model.generate(chunk, curr_pos=start, first_key=first_key, num_logits=1)
    assert 0 < largest.elements < chunk_size * chunk_size


@CUDA_ONLY
@pytest.mark.parametrize("is_padded", [False, True])
def test_memory_above_weights_and_cache(is_padded, device):
    """Of each token, a layer's input, output and what is between; never a row for every key."""
    model, s = build(device), CONFIG["max_seq_len"]
    tokens = random_tokens(device, 1, s)
    first_key = torch.tensor([5], device=device) if is_padded else None
    model.generate(tokens, first_key=first_key, num_logits=1)
    peak = peak_bytes(
        lambda: model.generate(tokens, first_key=first_key, num_logits=1), torch.device(device)
    )
    rows = 4 * CONFIG["embed_dim"]  # old and new residual, the normed input, the output
    between = 3 * 4096 * CONFIG["intermediate_dim"]  # gates, ups and their products of some rows
    assert peak < 2 * (s * rows + between) * 1.05
    assert peak < s * s, "less than a bool mask"


@CUDA_ONLY
@pytest.mark.parametrize("is_padded", [False, True])
def test_nothing_waits_for_the_device(is_padded, device):
    model, tokens = build(device), random_tokens(device, 2, 300)
    first_key = torch.tensor([0, 7], device=device) if is_padded else None
    model.generate(tokens, first_key=first_key, num_logits=1)  # makes the cache
    try:
        torch.cuda.set_sync_debug_mode("error")
        model.generate(tokens, first_key=first_key, num_logits=1)
        model.generate(tokens[:, :100], first_key=first_key, num_logits=1)
        model.generate(tokens[:, 100:], curr_pos=100, first_key=first_key, num_logits=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA_ONLY
def test_a_prompt_replays_in_a_cuda_graph(device):
    model, tokens = build(device), random_tokens(device, 2, 300)
    model.generate(tokens, num_logits=1)
    decoder, step = model.model, model.model.next_step(2, 300, start=0)
    static = tokens.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        decoder(static, step=step, num_logits=1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        logits = decoder(static, step=step, num_logits=1)
    for _ in range(2):
        tokens = random_tokens(device, 2, 300)
        _, expected = model.generate(tokens, num_logits=1)
        static.copy_(tokens)
        graph.replay()
        assert torch.equal(logits, expected)
