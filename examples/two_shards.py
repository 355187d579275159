"""Two shards of one model by hand: what whoever cuts a model over machines writes.

    python examples/two_shards.py "def "

Each shard could be in a process of its own: from one to the next go a hidden state, ``[1, s,
hidden_size]``, and ``curr_pos``; back to the first go the token and ``curr_pos``.
examples/exo_engine.py does that.
"""

import sys

import torch

import fastshard

NUM_TOKENS = 20


def main() -> None:
    first = fastshard.load(shard=fastshard.Shard("demo", start_layer=0, end_layer=1, n_layers=5))
    last = fastshard.load(shard=fastshard.Shard("demo", start_layer=2, end_layer=4, n_layers=5))
    tokenizer = first.tokenizer
    tokens = torch.tensor([tokenizer.encode(sys.argv[1])], device=first.device)

    curr_pos, new_tokens = 0, []
    while len(new_tokens) < NUM_TOKENS:
        hidden, _ = first.generate(tokens, curr_pos=curr_pos)
        _, logits = last.generate(
            hidden_state=hidden.to(last.device), curr_pos=curr_pos, num_logits=1
        )
        curr_pos += tokens.shape[1]  # both caches hold these tokens now
        tokens = logits[:, -1].argmax(dim=-1, keepdim=True).to(first.device)  # [1, 1]
        new_tokens.append(tokens.item())
    print(sys.argv[1] + tokenizer.decode(new_tokens))


if __name__ == "__main__":
    main()
