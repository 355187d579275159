"""Train the embedded demo model: a small Llama on the sources of the Python standard library.

    python examples/train_demo_model.py --output fastshard/demo --minutes 4

Needs torch, tokenizers and safetensors, no network, and runs on whatever device is there. Writes a
Hugging Face directory: float16 weights, tokenizer, configs and a note about the text, 7.3 MB.
"""

import argparse
import json
import math
import platform
import random
import sysconfig
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END = "<|endoftext|>"  # id 0, between files
VOCAB_SIZE = 2048
# A line's end with the next indentation, spaces, a word, a digit, signs: no token crosses these
# borders. So a word is the same token behind a space, and a prompt may end with that space.
WORDS = r"\n+ *| +|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+|\s"
# Generated tables and documentation, foreign packages, and tests: their style would drown the rest
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
README = """# The embedded demo model

A Llama-shaped model of {millions:.1f} million parameters, made by `examples/train_demo_model.py`
from the sources of the standard library of Python {python} ({megabytes:.1f} MB of text), and from
nothing else.

The training text is Copyright (c) 2001 Python Software Foundation and others, used under the PSF
License Agreement (LICENSE.txt, https://docs.python.org/3/license.html), which permits derivative
works. The model repeats pieces of that text; such pieces stay under that licence.

Held-out loss: {loss:.3f} nats a token, {bits:.3f} bits a byte.
"""


@dataclass(frozen=True)
class Config:
    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    intermediate_size: int = 544
    num_layers: int = 5
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def to_hugging_face(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_qo_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "float16",
        }


def read_sources() -> list[str]:
    """The standard library's Python files by path, without duplicates and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8").strip() + "\n"
        except UnicodeDecodeError:
            continue
        letters = sum(c.isalpha() or c.isspace() for c in text)
        if len(text) > 200 and letters > 0.7 * len(text):
            texts[text] = None
    return list(texts)


def split_held_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """One file in 25, chosen by its content, is held out."""
    held_out = [text for text in texts if sha256(text.encode()).digest()[0] < 10]
    chosen = set(held_out)
    return [text for text in texts if text not in chosen], held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE, so that every text has tokens and every sequence of tokens is text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], rng: random.Random | None) -> Tensor:
    """One int16 stream of all texts, each begun by END; ``rng`` shuffles them and cuts them up.

    A prompt ends anywhere, also within a word, where an uncut text has one longer token. The random
    cuts show the model such borders; several streams with other cuts are also more text.
    """
    order = list(texts)
    pieces: list[str] = []
    if rng:
        rng.shuffle(order)
    for text in order:
        pieces.append(END)
        start = 0
        while start < len(text):
            stop = start + 1 + int(rng.expovariate(1 / 80)) if rng else len(text)
            pieces.append(text[start:stop])
            start = stop
    ids = [i for encoding in tokenizer.encode_batch(pieces) for i in encoding.ids]
    return torch.tensor(ids, dtype=torch.int16)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, pairs (i, i + d / 2); x [b, n, s, d], tables [s, d]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_qo_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, n, s, d]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(x, cos, sin).to(v.dtype) for x in (q, k))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(heads.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dropout: float) -> Tensor:
        heads = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + F.dropout(heads, dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), dropout, self.training)


class Llama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        powers = torch.arange(0, config.head_dim, 2) / config.head_dim
        positions = torch.arange(config.max_position_embeddings)
        angles = torch.outer(positions, config.rope_theta**-powers).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    weight, std=0.02 / math.sqrt(2 * config.num_layers if into_residual else 1)
                )

    def forward(self, tokens: Tensor, dropout: float = 0.0) -> Tensor:
        """tokens [b, s] -> logits [b, s, vocab_size]; the head is the embedding."""
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin, dropout)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def draw_batch(stream: Tensor, batch: int, window: int, generator: torch.Generator) -> Tensor:
    """Windows at random offsets, [batch, window + 1] int64, on the device of ``stream``."""
    starts = torch.randint(len(stream) - window, (batch, 1), generator=generator)
    return stream[starts.to(stream.device) + torch.arange(window + 1, device=stream.device)].long()


def loss_of(model: nn.Module, tokens: Tensor, dropout: float = 0.0) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(tokens[:, :-1], dropout)
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, window: int, batch: int) -> float:
    """Mean loss in nats a token over the held-out stream, cut into windows."""
    model.eval()
    windows = (
        stream[: (len(stream) - 1) // window * window + 1].unfold(0, window + 1, window).long()
    )
    losses = [loss_of(model, part) * len(part) for part in windows.split(batch)]
    model.train()
    return float(sum(losses)) / len(windows)


def train(model: Llama, stream: Tensor, held_out: Tensor, args: argparse.Namespace) -> float:
    """Train for ``args.minutes``; leave the weights of the best held-out loss, return that loss."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=stream.is_cuda
    )
    compiled = torch.compile(model) if args.compile else model
    batch = max(1, args.batch_tokens // args.window)
    generator = torch.Generator().manual_seed(args.seed)
    if args.compile:  # not counted as training
        loss_of(
            compiled, draw_batch(stream, batch, args.window, generator), args.dropout
        ).backward()
        optimizer.zero_grad()

    best, best_weights = math.inf, {}
    start, step, evaluations, passed = time.monotonic(), 0, 0, 0.0
    while passed < 1:
        if stream.is_cuda:
            torch.cuda.synchronize()  # else the host runs ahead and the schedule is blind
        passed = min(1.0, (time.monotonic() - start) / (60 * args.minutes))
        warm = min(1.0, passed / 0.02)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * passed)))
        loss = loss_of(compiled, draw_batch(stream, batch, args.window, generator), args.dropout)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if passed >= (evaluations + 1) / args.evaluations:
            evaluations = int(passed * args.evaluations)
            held_out_loss = evaluate(model, held_out, args.window, batch)
            epochs = step * batch * args.window / len(stream)
            print(
                f"{passed:4.0%}  step {step}  epochs {epochs:.1f}  "
                f"training loss {loss.item():.3f}  held-out loss {held_out_loss:.3f}",
                flush=True,
            )
            if held_out_loss < best:
                best = held_out_loss
                best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return best


@torch.no_grad()
def sample(model: Llama, tokenizer: Tokenizer, prompt: str, count: int, seed: int) -> str:
    """Continue ``prompt`` at temperature 0.6, to be read by a human."""
    model.eval()
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    for _ in range(count):
        logits = model(ids)[0, -1] / 0.6
        ids = torch.cat((ids, logits.softmax(0).multinomial(1, generator=generator)[None]), dim=1)
    return tokenizer.decode(ids[0].tolist())


def save(model: Llama, config: Config, tokenizer: Tokenizer, readme: str, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": weight.detach().half().cpu().contiguous()
        for name, weight in model.named_parameters()
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    documents = {
        "config.json": config.to_hugging_face(),
        "generation_config.json": {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "do_sample": True,  # greedy text of so small a model repeats itself
            "temperature": 0.6,
            "top_p": 0.9,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
        },
    }
    (output / "model.safetensors").chmod(0o644)
    for name, document in documents.items():
        (output / name).write_text(json.dumps(document, indent=2) + "\n")
    (output / "README.md").write_text(readme)
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():
        (output / "LICENSE.txt").write_bytes(licence.read_bytes())


def parse_arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=4.0, help="time to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--window", type=int, default=1024 if cuda else 256, help="tokens a sequence"
    )
    parser.add_argument("--batch-tokens", type=int, default=65536 if cuda else 1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1 if cuda else 0.0)
    parser.add_argument("--cuts", type=int, default=4 if cuda else 1, help="streams, each cut anew")
    parser.add_argument("--evaluations", type=int, default=20 if cuda else 4)
    parser.add_argument("--held-out-tokens", type=int, default=200_000 if cuda else 8_000)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    config = Config()
    texts, held_out_texts = split_held_out(read_sources())
    text_bytes = sum(len(text.encode()) for text in texts)
    start = time.monotonic()
    tokenizer = train_tokenizer(texts)
    rng = random.Random(args.seed)
    stream = torch.cat([encode(tokenizer, texts, rng) for _ in range(args.cuts)]).to(args.device)
    held_out = encode(tokenizer, held_out_texts, None).to(args.device)
    part = held_out[: args.held_out_tokens]  # evaluated while training
    print(
        f"{len(texts)} files, {text_bytes / 1e6:.1f} MB, {len(stream) / 1e6:.1f} M tokens in "
        f"{args.cuts} streams; {len(held_out_texts)} files, {len(held_out) / 1e3:.0f} k tokens "
        f"held out; tokenized in {time.monotonic() - start:.0f} s",
        flush=True,
    )

    model = Llama(config).to(args.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    train(model, stream, part, args)
    model.half().float()  # what is saved is what is measured
    loss = evaluate(model, held_out, args.window, max(1, args.batch_tokens // args.window))
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    bits = loss / math.log(2) * len(held_out) / held_out_bytes
    readme = README.format(
        millions=num_parameters / 1e6,
        python=platform.python_version(),
        megabytes=text_bytes / 1e6,
        loss=loss,
        bits=bits,
    )
    save(model, config, tokenizer, readme, args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"held-out loss {loss:.3f}, {bits:.3f} bits a byte; {args.output}: {size / 1e6:.2f} MB")
    for prompt in ("def ", "class ", "import "):
        print(f"--- {prompt!r}\n{sample(model, tokenizer, prompt, 120, args.seed)}")


if __name__ == "__main__":
    main()
