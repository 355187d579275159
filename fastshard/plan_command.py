"""``fastshard plan``: which layers of a model each GPU would hold, and whether they fit."""

import argparse
import json
from collections.abc import Sequence

import torch

from fastshard.arguments import DTYPES, count, gigabytes, layers, number
from fastshard.bench.presets import PRESETS, find_model
from fastshard.devices import default_dtype
from fastshard.dist import RankShare, check_shares, plan

DEFAULT_CONTEXT = 4096
DEFAULT_RESERVE = 1.0
"""GB of each GPU for the CUDA context, libraries and activations: an allowance, not measured."""

_GB = 10**9
_COLUMNS = ("rank", "layers", "weights", "cache", "other", "all", "of", "share", "")


def add_command(commands: "argparse._SubParsersAction") -> None:
    """Add the command ``plan``."""
    command = commands.add_parser(
        "plan",
        help="cut a model's layers over GPUs of given sizes",
        description="Print which layers each GPU would hold, what they take, and whether they fit. "
        "Reads config.json only. Without --layers the largest share of any GPU's memory is as "
        "small as it can be. GB are 10^9 bytes. Exit status 1 where a GPU has too little.",
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "--model",
        metavar="DIR|HUB_ID|PRESET",
        required=True,
        help=f"checkpoint, or a shape: {', '.join(PRESETS)}",
    )
    add(
        "--gpus",
        metavar="GB,GB",
        type=gigabytes,
        required=True,
        help="memory of each GPU, in the order of the layers, like 24,24,16",
    )
    add("--layers", type=layers, metavar="A-B,C-D", help="layers of each GPU, ends included")
    add(
        "--tp",
        type=count,
        metavar="N",
        default=1,
        help="N GPUs in turn share their layers, each a part of every one; --layers is then for "
        "each N GPUs (default: 1)",
    )
    add("--batch", type=count, metavar="N", default=1, help="rows of the cache (default: 1)")
    add(
        "--context",
        type=count,
        metavar="N",
        help=f"tokens in the cache (default: {DEFAULT_CONTEXT}, or all that the model takes)",
    )
    add("--dtype", choices=DTYPES[1:], help="default: the checkpoint's own, else bfloat16")
    add(
        "--reserve",
        type=number,
        metavar="GB",
        default=DEFAULT_RESERVE,
        help="of each GPU, for the CUDA context, libraries and activations; an allowance, not "
        "measured (default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan; raises ``ValueError`` behind it where a GPU has too little."""
    config, raw_config = find_model(args.model)
    if args.dtype:
        dtype = getattr(torch, args.dtype)
    else:
        dtype = default_dtype(raw_config, torch.device("cuda"))
    context = args.context or min(DEFAULT_CONTEXT, config.max_seq_len)
    shares = plan(
        config,
        [round(size * _GB) for size in args.gpus],
        dtype=dtype,
        context=context,
        batch=args.batch,
        reserve=round(args.reserve * _GB),
        layers=args.layers,
        tp=args.tp,
        model_id=args.model,
    )
    settings = {
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": args.batch,
        "context": context,
        "tp": args.tp,
        "reserve_bytes": shares[0].reserve_bytes,
    }
    if args.json:
        settings["fits"] = all(share.fits for share in shares)
        print(json.dumps(settings | {"ranks": [_facts(share) for share in shares]}, indent=2))
    else:
        print("\n".join(_lines(settings, shares)))
    check_shares(shares)
    return 0


def _facts(share: RankShare) -> dict:
    """One rank as plain values, both ends of its layers included."""
    return {
        "rank": share.rank,
        "start_layer": share.shard.start_layer,
        "end_layer": share.shard.end_layer,
        "weight_bytes": share.weight_bytes,
        "cache_bytes": share.cache_bytes,
        "table_bytes": share.table_bytes,
        "needed_bytes": share.needed_bytes,
        "free_bytes": share.free_bytes,
        "share": share.share,
        "fits": share.fits,
    }


def _lines(settings: dict, shares: Sequence[RankShare]) -> list[str]:
    """What is planned, the table with its sums, and what its columns mean."""
    cells = [_COLUMNS, *map(_cells, shares), _sums(shares)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True))
        + f"  {row[-1]}"
        for row in cells
    ]
    shared = "" if settings["tp"] == 1 else f", {settings['tp']} GPUs share each layer"
    return [
        f"{settings['model']} in {settings['dtype']}, batch {settings['batch']}, "
        f"context {settings['context']}{shared}; sizes in GB of 10^9 bytes",
        *(line.rstrip() for line in table),
        f"other: the RoPE table, and {settings['reserve_bytes'] / _GB:.2f} GB kept for the CUDA "
        "context, libraries and activations (--reserve)",
    ]


def _cells(share: RankShare) -> tuple[str, ...]:
    first, last = share.shard.start_layer, share.shard.end_layer
    return (
        str(share.rank),
        f"{first}-{last}",
        *_gigabytes(share),
        f"{100 * share.share:.1f} %",
        "fits" if share.fits else "does not fit",
    )


def _gigabytes(share: RankShare) -> tuple[str, ...]:
    other = share.table_bytes + share.reserve_bytes
    sizes = (share.weight_bytes, share.cache_bytes, other, share.needed_bytes, share.free_bytes)
    return tuple(f"{size / _GB:.2f}" for size in sizes)


def _sums(shares: Sequence[RankShare]) -> tuple[str, ...]:
    weights, caches = (sum(s.weight_bytes for s in shares), sum(s.cache_bytes for s in shares))
    needed, free = (sum(s.needed_bytes for s in shares), sum(s.free_bytes for s in shares))
    sizes = (weights, caches, needed - weights - caches, needed, free)
    return ("sum", "", *(f"{size / _GB:.2f}" for size in sizes), f"{100 * needed / free:.1f} %", "")
