"""Continue a prompt, and several at once.

    python examples/generate.py "def " [DIRECTORY_OR_HUB_ID]

Without a second argument the model is the small one that comes with fastshard.
"""

import sys

import fastshard


def main() -> None:
    prompt, source = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    model = fastshard.load(source)

    # Text as it comes; without a temperature as the checkpoint says
    stream = model.stream(prompt, max_new_tokens=40, temperature=0.7, top_p=0.9, seed=1)
    for piece in stream:
        print(piece, end="", flush=True)
    print(f"\n[{stream.num_tokens} tokens, {stream.decode_seconds:.2f} s after the first]")

    # Tokens of many prompts of different lengths, greedily
    prompts = [model.tokenizer.encode(text) for text in (prompt, "import ", "class Test")]
    for row in fastshard.generate_batch(model, prompts, max_new_tokens=10):
        print(row, repr(model.tokenizer.decode(row)))


if __name__ == "__main__":
    main()
