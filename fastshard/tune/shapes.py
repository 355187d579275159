"""The problems of a model: what its layers and head compute, of prompts and of single tokens."""

from fastshard.models import ModelConfig
from fastshard.tune.problem import Problem

NORM_ROWS = (1, 16, 512, 2048, 8192)
MLP_ROWS = (1, 4, 16, 64, 512, 2048, 8192)
LINEAR_ROWS = (1, 4, 8, 16)
PROMPTS = (512, 2048, 8192)
CACHED = ((1, 1, 1024), (1, 1, 4096), (1, 1, 32768), (8, 1, 1024), (8, 1, 4096))
CACHED += ((1, 4, 1024), (1, 4, 4096), (1, 16, 4096), (1, 64, 4096), (1, 512, 4096))
"""``(batch, s_q, s_kv)``: single tokens, some tokens at a time, and a chunk of a prompt."""


def problems(config: ModelConfig, dtype: str) -> list[Problem]:
    """Everything that is tuned for a model, an op's problems side by side.

    Args:
        config: Of the model; contexts longer than its own are left out.
        dtype: float16 or bfloat16.
    """
    hidden, heads = config.hidden_size, (config.num_heads, config.num_kv_heads, config.head_dim)
    q_size, kv_size = heads[0] * heads[2], heads[1] * heads[2]
    longest = config.max_seq_len
    matrices = [(hidden, q_size + 2 * kv_size), (q_size, hidden), (hidden, config.vocab_size)]
    shapes = {
        "rms_norm": [(rows, hidden) for rows in NORM_ROWS],
        "add_rms_norm": [(rows, hidden) for rows in NORM_ROWS],
        "fused_mlp": [(rows, hidden, config.intermediate_size) for rows in MLP_ROWS],
        "linear": [(rows, *matrix) for matrix in matrices for rows in LINEAR_ROWS],
        "attention": [(1, tokens, tokens, *heads) for tokens in PROMPTS if tokens <= longest],
        "cached_attention": [(*counts, *heads) for counts in CACHED if counts[2] <= longest],
    }
    return [Problem(op, dtype, shape) for op, of_op in shapes.items() for shape in of_op]


def layer_norms(config: ModelConfig, dtype: str) -> list[Problem]:
    """LayerNorms of the model's width: no model has them, but what is built on the ops may."""
    return [Problem("layer_norm", dtype, (rows, config.hidden_size)) for rows in NORM_ROWS]
