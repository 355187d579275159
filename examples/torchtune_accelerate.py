"""torchtune's `generate` on fastshard's ops, and one layer shard of the same model.

Usage: python examples/torchtune_accelerate.py

Needs the extra `torchtune`. The model is small and its weights are random: put a builder such as
`torchtune.models.llama3_2.llama3_2_1b` and a checkpoint in its place.
"""

import torch
from torchtune.generation import generate
from torchtune.models.llama3_2._component_builders import llama3_2

import fastshard
from fastshard.integrations.torchtune import accelerate, config_of, undo


def small_model() -> torch.nn.Module:
    """A Llama 3.2 of two layers."""
    torch.manual_seed(0)
    return llama3_2(
        vocab_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=128,
        max_seq_len=128,
    ).eval()


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = small_model().to(device, dtype)
    prompt = torch.tensor([[3, 141, 59, 26, 53]], device=device)

    accelerate(model)  # in place: the caller's code stays as it is
    with device:
        model.setup_caches(batch_size=1, dtype=dtype, decoder_max_seq_len=32)
    tokens, _ = generate(model, prompt, max_generated_tokens=8, top_k=1)
    print("accelerated:", tokens[0].tolist())

    undo(model)
    model.reset_caches()
    tokens, _ = generate(model, prompt, max_generated_tokens=8, top_k=1)
    print("torchtune:  ", tokens[0].tolist())

    shard = fastshard.Shard("small", start_layer=0, end_layer=0, n_layers=2)
    first = fastshard.GeneralMHA(config_of(small_model), shard, device=device, dtype=dtype)
    state = model.state_dict()
    first.load_state_dict({name: state[name] for name in first.state_dict()})
    print("hidden state of the first layer:", list(first(prompt).shape))


if __name__ == "__main__":
    main()
