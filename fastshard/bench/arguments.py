"""Command lines of ``fastshard bench``, ``bench compare`` and ``bench plot``."""

import argparse
from pathlib import Path

from fastshard.arguments import DTYPES, PLOT_FORMATS, argument, count, number

BENCHMARKS = (
    "attention",
    "linear",
    "mlp",
    "norm",
    "prefill",
    "decode",
    "start",
    "load",
    "adapters",
    "ranks",
)
COMMANDS = ("bench compare", "bench plot")
"""Commands whose names are two words."""
DECODE_MODES = ("persistent", "graph", "eager")
PEERS = ("eager", "compile", "autotune", "sdpa", "torchtune")


@argument(f"one of {', '.join(BENCHMARKS)}, all", choices=(*BENCHMARKS, "all"))
def benchmark(text: str) -> str:
    if text not in (*BENCHMARKS, "all"):
        raise ValueError
    return text


@argument(f"none, or some of {', '.join(PEERS)}", choices=("none", *PEERS))
def peers(text: str) -> tuple[str, ...]:
    chosen = () if text == "none" else tuple(text.split(","))
    if not set(chosen) <= set(PEERS):
        raise ValueError
    return chosen


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Add the three commands."""
    _add_bench(commands)
    _add_bench_compare(commands)
    _add_bench_plot(commands)


def _add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time kernels, prefill and decode steps against this GPU's limits and PyTorch",
        description="Time on the current GPU, one line a case. BENCHMARK is any of "
        f"{', '.join(BENCHMARKS)} or all (the default); without more, at the shapes of our goals. "
        "See also fastshard bench compare --help and fastshard bench plot --help.",
    )
    bench.set_defaults(run=run_bench)
    add = bench.add_argument
    add("benchmarks", metavar="BENCHMARK", nargs="*", help="what to time", type=benchmark)
    add("--model", metavar="PRESET", nargs="+", help="shapes, like llama-3.2-1b qwen2.5-0.5b")
    add(
        "--batch",
        metavar="N",
        nargs="+",
        type=count,
        help="batch sizes; rows of linear, mlp, norm",
    )
    add(
        "--context",
        metavar="N",
        nargs="+",
        type=count,
        help="keys in the cache; tokens of prefill",
    )
    add("--layers", metavar="N", type=count, help="only the first N layers of each model")
    add("--ranks", metavar="N", nargs="+", type=count, help="GPUs of ranks (default: 2 4 8)")
    add("--decode", metavar="MODE", nargs="+", choices=DECODE_MODES, help="our ways to decode")
    add("--dtype", choices=DTYPES[1:], default="bfloat16", help="default: bfloat16")
    add(
        "--vs",
        metavar="PEER,PEER",
        type=peers,
        default=("eager", "compile", "sdpa"),
        help=f"of {', '.join(PEERS)}, or none (default: eager,compile,sdpa)",
    )
    add("--compile-all", action="store_true", help="compile whole models of any size: minutes")
    add("--time-limit", metavar="S", type=number, help="compile no peer after S seconds")
    add("--rounds", metavar="N", type=count, default=50, help="samples a line (default: 50)")
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--plot", metavar="FILE", help=f"draw bars and a roofline, {PLOT_FORMATS}")


def _add_bench_compare(commands) -> None:
    compare = commands.add_parser(
        "bench compare",
        help="put the times of two results beside each other",
        description="Match the lines of two files that fastshard bench --json wrote, by case, "
        "variant, shape and dtype, and print both times, A/B, "
        "and whether they are equal within their spread.",
    )
    compare.set_defaults(run=run_bench_compare)
    compare.add_argument("a", metavar="A.json", help="the result to compare with")
    compare.add_argument("b", metavar="B.json", help="the result that is compared")


def run_bench_compare(args: argparse.Namespace) -> int:
    from fastshard.bench import compare

    for line in compare.lines(Path(args.a), Path(args.b)):
        print(line)
    return 0


def _add_bench_plot(commands) -> None:
    plot = commands.add_parser(
        "bench plot",
        help="draw bars and a roofline of results",
        description="Draw what fastshard bench --json wrote on one GPU: our times and those of the "
        f"best peer as shares of the measured limits, and a roofline, {PLOT_FORMATS}.",
    )
    plot.set_defaults(run=run_bench_plot)
    plot.add_argument("results", metavar="RESULT.json", nargs="+", help="what was measured")
    plot.add_argument("file", metavar="FILE", help="written over")


def run_bench_plot(args: argparse.Namespace) -> int:
    from fastshard.bench import plot, result_file

    plot.check(Path(args.file))
    plot.write([result_file.read(Path(path)) for path in args.results], Path(args.file))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    import torch

    from fastshard.bench.case import Settings
    from fastshard.bench.command import run

    settings = Settings(
        models=args.model and tuple(args.model),
        batches=args.batch and tuple(args.batch),
        contexts=args.context and tuple(args.context),
        modes=tuple(args.decode or DECODE_MODES),
        peers=args.vs,
        compiles_all=args.compile_all,
        dtype=getattr(torch, args.dtype),
        num_layers=args.layers,
        ranks=args.ranks and tuple(args.ranks),
    )
    run(
        BENCHMARKS if "all" in (args.benchmarks or ("all",)) else args.benchmarks,
        settings,
        command=["fastshard", *args.command_line],
        json_path=args.json and Path(args.json),
        plot_path=args.plot and Path(args.plot),
        time_limit=args.time_limit,
        rounds=args.rounds,
        say=lambda line: print(line, flush=True),
    )
    return 0
