"""The command line: ``fastshard generate``, ``bench``, ``bench compare``, ``bench plot``, ``tune``,
``profile`` and ``info``.

Of ``generate`` only the text goes to stdout; progress, figures and errors go to stderr. Exit
status: 0, 2 where the command line is wrong, 1 for everything else that fails.
"""

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import fastshard
from fastshard.decode import MODES
from fastshard.environment import emits_nvtx
from fastshard.token_loop import DEFAULT_PREFILL_CHUNK_SIZE

_DTYPES = ("float32", "float16", "bfloat16")
_BENCHMARKS = ("attention", "linear", "mlp", "norm", "prefill", "decode", "start", "load")
_BENCH_COMMANDS = ("bench compare", "bench plot")
_PLOT = "as PNG or SVG by its name (needs matplotlib: the extra bench)"
_DECODE_MODES = ("persistent", "graph", "eager")
_SORTS = ("time", "name")
_STRATEGIES = ("evolve", "random", "all")
_PEERS = ("eager", "compile", "autotune", "sdpa", "torchtune")


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = _parse(arguments)
    try:
        with warnings.catch_warnings(), _ranges(args):
            warnings.showwarning = _show_warning
            return args.run(args)
    except BrokenPipeError:  # the reader of stdout has had enough; Python flushes it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fastshard: error: {message}", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The parsed command line; what ``profile`` is given behind its ``--`` is one of its own."""
    split = len(arguments)
    if arguments[:1] == ["profile"] and "--" in arguments:
        split = arguments.index("--")
    args = build_parser().parse_args(_as_one_command(arguments[:split]))
    args.command_line = arguments
    if args.run is run_profile:
        args.profiled_words = arguments[split + 1 :]
        if args.profiled_words[:1] in ([], ["profile"]):
            got = args.profiled_words[0] if args.profiled_words else "nothing"
            args.parser.error(f"-- and another command of fastshard must follow, got {got}")
        args.profiled = _parse(args.profiled_words)
    return args


def _ranges(args: argparse.Namespace) -> AbstractContextManager:
    """NVTX ranges, where the environment asks for them; ``profile`` makes its own kind."""
    if not emits_nvtx() or args.run is run_profile:
        return nullcontext()
    from fastshard.profile import ranges

    return ranges(nvtx=True)


def _as_one_command(arguments: list[str]) -> list[str]:
    """``bench compare`` and ``bench plot`` are commands whose names are two words."""
    name = " ".join(arguments[:2])
    return [name, *arguments[2:]] if name in _BENCH_COMMANDS else arguments


def _show_warning(message: Warning | str, *where) -> None:
    print(f"fastshard: warning: {message}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastshard", description=fastshard.__doc__)
    parser.add_argument("--version", action="version", version=fastshard.__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_bench(commands)
    _add_bench_compare(commands)
    _add_bench_plot(commands)
    _add_tune(commands)
    _add_profile(commands)
    info = commands.add_parser("info", help="what is installed, compiled and visible")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "--kernels",
        action="store_true",
        help="list what each compiled kernel takes (needs cuobjdump and nvdisasm)",
    )
    info.set_defaults(run=run_info)
    return parser


def _add_generate(commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue PROMPT and print the text as it comes.",
    )
    generate.set_defaults(run=run_generate)
    add = generate.add_argument
    add("prompt", metavar="PROMPT", help="text to continue; - reads it from stdin")
    add("--model", metavar="DIR|HUB_ID", help="checkpoint (default: the embedded demo model)")
    split = generate.add_mutually_exclusive_group()
    split.add_argument("--shards", type=_count, metavar="N", help="cut the layers into N shards")
    split.add_argument(
        "--layers", type=_layers, metavar="A-B,C-D", help="layers of each shard, ends included"
    )
    add("--device", help="cpu, cuda or cuda:N (default: the GPU, if this build serves one)")
    add("--dtype", choices=_DTYPES, help="default: float32 on a CPU, else the checkpoint's 16 bit")
    add("--max-new-tokens", type=_count, metavar="N", default=128, help="default: 128")
    sampled = "(default: as the checkpoint says, or"
    add("--temperature", type=_number, metavar="T", help=f"0 is greedy {sampled} 0)")
    add("--top-k", type=_whole, metavar="K", help=f"only the K likeliest tokens {sampled} all)")
    add("--top-p", type=_number, metavar="P", help=f"only the likeliest of sum P {sampled} 1)")
    add("--min-p", type=_number, metavar="P", help=f"only P times the likeliest {sampled} 0)")
    add("--seed", type=_whole, default=0, help="the same seed gives the same text (default: 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--chat", action="store_true", help="put the prompt into the chat template")
    add("--decode", choices=MODES, help="default: FASTSHARD_DECODE, else auto")
    add(
        "--prefill-chunk-size",
        type=_count,
        metavar="N",
        default=DEFAULT_PREFILL_CHUNK_SIZE,
        help="tokens of the prompt at a time, for less memory (default: %(default)s)",
    )


def _add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time kernels, prefill and decode steps against this GPU's limits and PyTorch",
        description="Time on the current GPU, one line a case. BENCHMARK is any of "
        f"{', '.join(_BENCHMARKS)} or all (the default); without more, at the shapes of our goals. "
        "See also fastshard bench compare --help and fastshard bench plot --help.",
    )
    bench.set_defaults(run=run_bench)
    add = bench.add_argument
    add("benchmarks", metavar="BENCHMARK", nargs="*", help="what to time", type=_benchmark)
    add("--model", metavar="PRESET", nargs="+", help="shapes, like llama-3.2-1b qwen2.5-0.5b")
    add(
        "--batch",
        metavar="N",
        nargs="+",
        type=_count,
        help="batch sizes; rows of linear, mlp, norm",
    )
    add(
        "--context",
        metavar="N",
        nargs="+",
        type=_count,
        help="keys in the cache; tokens of prefill",
    )
    add("--layers", metavar="N", type=_count, help="only the first N layers of each model")
    add("--decode", metavar="MODE", nargs="+", choices=_DECODE_MODES, help="our ways to decode")
    add("--dtype", choices=_DTYPES[1:], default="bfloat16", help="default: bfloat16")
    add(
        "--vs",
        metavar="PEER,PEER",
        type=_peers,
        default=("eager", "compile", "sdpa"),
        help=f"of {', '.join(_PEERS)}, or none (default: eager,compile,sdpa)",
    )
    add("--compile-all", action="store_true", help="compile whole models of any size: minutes")
    add("--time-limit", metavar="S", type=_number, help="compile no peer after S seconds")
    add("--rounds", metavar="N", type=_count, default=50, help="samples a line (default: 50)")
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--plot", metavar="FILE", help=f"draw bars and a roofline, {_PLOT}")


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


def _add_tune(commands) -> None:
    tune = commands.add_parser(
        "tune",
        help="find the fastest variant of each kernel on this GPU",
        description="Search the compiled variants of the kernels at the shapes of a model, and "
        "write a table by which they are chosen from then on. Needs Optuna: the extra tune.",
    )
    tune.set_defaults(run=run_tune)
    add = tune.add_argument
    add("--model", metavar="PRESET|DIR", default="llama-3.1-8b", help="default: %(default)s")
    add("--op", metavar="OP", nargs="+", help="like rms_norm attention (default: all)")
    add("--dtype", choices=_DTYPES[1:], default="bfloat16", help="default: bfloat16")
    add("--budget", metavar="T", type=_seconds, default=120.0, help="like 90s or 5m (default: 2m)")
    add("--seed", metavar="N", type=_whole, default=0, help="default: 0")
    add("--strategy", choices=_STRATEGIES, default="evolve", help="default: evolve")
    add("--study", metavar="FILE", help="measurements: kept, and not made again")
    add("--replay", action="store_true", help="measure nothing, search what --study holds")
    add("--output", metavar="FILE", help="the table (default: that of this user and GPU)")
    add(
        "--patch",
        metavar="FILE",
        help="compile variants outside the menus too, and write a patch that adds the winners: for "
        "git apply in a checkout (needs nvcc)",
    )
    add("--source", metavar="DIR", help="the checkout for --patch (default: this folder)")
    add("--plot", metavar="FILE", help=f"draw the gain over time, {_PLOT}")
    add(
        "--on-paper",
        metavar="CAPABILITY",
        help="measure nothing, write to --output what a cost model chooses for, say, 8.6",
    )


def run_tune(args: argparse.Namespace) -> int:
    from pathlib import Path

    from fastshard.tune import command

    def path(name: str | None) -> Path | None:
        return name and Path(name)

    if args.on_paper is not None:
        if args.output is None:
            raise ValueError("--on-paper needs --output")
        table = command.write_model_table(args.on_paper, Path(args.output))
        print(f"{len(table.entries)} entries written to {args.output}")
        return 0
    with _Progress(f"tuning {args.model}") as progress:
        return command.run(
            model_name=args.model,
            ops=args.op,
            dtype=args.dtype,
            budget=args.budget,
            seed=args.seed,
            strategy=args.strategy,
            study_path=path(args.study),
            replays=args.replay,
            output=path(args.output),
            patch_path=path(args.patch),
            source=path(args.source),
            plot_path=path(args.plot),
            say=lambda line: print(line, flush=True),
            advance=lambda share: progress.update(round(1000 * share), 1000),
        )


def _add_profile(commands) -> None:
    profile = commands.add_parser(
        "profile",
        help="say where the time of another command goes",
        usage="%(prog)s [-h] [--trace FILE] [--sort {time,name}] -- COMMAND ...",
        description="Run COMMAND, like generate with its arguments, under torch.profiler, and "
        "print to stderr the time of each kernel (of each op without a GPU), on a GPU also of our "
        "ops beside its measured limits, and command lines of Nsight Systems and Compute.",
    )
    profile.set_defaults(run=run_profile, parser=profile)
    add = profile.add_argument
    add("--trace", metavar="FILE", help="write a Chrome trace, with a range for each layer")
    add("--sort", choices=_SORTS, default="time", help="default: time, the longest first")


def run_profile(args: argparse.Namespace) -> int:
    from pathlib import Path

    from fastshard.profile.command import run

    return run(
        args.profiled_words,
        lambda: args.profiled.run(args.profiled),
        trace=args.trace and Path(args.trace),
        sort=args.sort,
        say=lambda line: print(line, file=sys.stderr),
    )


def run_bench_compare(args: argparse.Namespace) -> int:
    from pathlib import Path

    from fastshard.bench import compare

    for line in compare.lines(Path(args.a), Path(args.b)):
        print(line)
    return 0


def _add_bench_plot(commands) -> None:
    plot = commands.add_parser(
        "bench plot",
        help="draw bars and a roofline of results",
        description="Draw what fastshard bench --json wrote on one GPU: our times and those of the "
        f"best peer as shares of the measured limits, and a roofline, {_PLOT}.",
    )
    plot.set_defaults(run=run_bench_plot)
    plot.add_argument("results", metavar="RESULT.json", nargs="+", help="what was measured")
    plot.add_argument("file", metavar="FILE", help="written over")


def run_bench_plot(args: argparse.Namespace) -> int:
    from pathlib import Path

    from fastshard.bench import plot, result_file

    plot.check(Path(args.file))
    plot.write([result_file.read(Path(path)) for path in args.results], Path(args.file))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from fastshard.bench.case import Settings
    from fastshard.bench.command import run

    settings = Settings(
        models=args.model and tuple(args.model),
        batches=args.batch and tuple(args.batch),
        contexts=args.context and tuple(args.context),
        modes=tuple(args.decode or _DECODE_MODES),
        peers=args.vs,
        compiles_all=args.compile_all,
        dtype=getattr(torch, args.dtype),
        num_layers=args.layers,
    )
    run(
        _BENCHMARKS if "all" in (args.benchmarks or ("all",)) else args.benchmarks,
        settings,
        command=["fastshard", *args.command_line],
        json_path=args.json and Path(args.json),
        plot_path=args.plot and Path(args.plot),
        time_limit=args.time_limit,
        rounds=args.rounds,
        say=lambda line: print(line, flush=True),
    )
    return 0


def run_info(args: argparse.Namespace) -> int:
    from fastshard.info import describe, format_text

    if args.kernels:
        return _list_kernels(args.json)
    facts = describe()
    print(json.dumps(facts, indent=2) if args.json else format_text(facts))
    return 0


def _list_kernels(as_json: bool) -> int:
    from fastshard.bench import kernels

    compiled = kernels.describe()
    if compiled["missing"]:
        raise RuntimeError("; ".join(compiled["missing"]))
    print(json.dumps(compiled, indent=2) if as_json else "\n".join(kernels.lines(compiled)))
    return 0


def run_generate(args: argparse.Namespace) -> int:
    import torch

    from fastshard.checkpoint import Checkpoint, even_split
    from fastshard.loading import demo_model, load_chain

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    checkpoint = Checkpoint(demo_model() if args.model is None else args.model)
    if checkpoint.tokenizer is None:
        raise ValueError(f"{checkpoint.name}: tokenizer.json is missing")
    layers = args.layers or even_split(checkpoint.config.num_layers, args.shards or 1)
    name = checkpoint.name if args.model else "demo model"
    with _Progress(f"loading {name}") as progress:
        chain = load_chain(
            checkpoint,
            layers,
            device=args.device,
            dtype=args.dtype and getattr(torch, args.dtype),
            max_generated_tokens=args.max_new_tokens,
            report=progress.update,
        )
    stream = chain.stream(
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        chat=args.chat,
        decode=args.decode,
        prefill_chunk_size=args.prefill_chunk_size,
    )
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(_figures(stream, chain.decode_bytes), file=sys.stderr)
    return 0


def _figures(stream, decode_bytes: int) -> str:
    """One line: how many tokens, how fast, and what that reads of the weights."""
    steps = stream.num_tokens - 1  # the first token belongs to the prompt
    text = (
        f"{stream.num_prompt_tokens} prompt tokens in {stream.prefill_seconds:.2f} s, "
        f"{stream.num_tokens} new tokens"
    )
    if steps > 0 and stream.decode_seconds > 0:
        rate = steps / stream.decode_seconds
        text += f" at {rate:.1f} tokens/s, {rate * decode_bytes / 1e9:.2f} GB/s of weights"
    return text


class _Progress:
    """A bar on stderr while something takes its time; a terminal shows it, a file does not."""

    def __init__(self, what: str):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    def update(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


def _argument(rule: str) -> Callable:
    """Make a converter's ``ValueError`` name the rule and the value."""

    def decorate(convert: Callable) -> Callable:
        def checked(text: str):
            try:
                return convert(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}") from None

        return checked

    return decorate


@_argument("a positive integer")
def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


@_argument("an integer of at least 0")
def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


@_argument("a finite number of at least 0")
def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


@_argument("a time like 90s or 5m")
def _seconds(text: str) -> float:
    seconds = float(text.rstrip("sm")) * {"m": 60}.get(text[-1:], 1)
    if not 0 <= seconds < math.inf or text[-2:].isalpha():
        raise ValueError
    return seconds


@_argument(f"one of {', '.join(_BENCHMARKS)}, all")
def _benchmark(text: str) -> str:
    if text not in (*_BENCHMARKS, "all"):
        raise ValueError
    return text


@_argument(f"none, or some of {', '.join(_PEERS)}")
def _peers(text: str) -> tuple[str, ...]:
    peers = () if text == "none" else tuple(text.split(","))
    if not set(peers) <= set(_PEERS):
        raise ValueError
    return peers


@_argument("ranges of layers with both ends, like 0-3,4-7")
def _layers(text: str) -> list[range]:
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts]
    if not all(ranges):
        raise ValueError
    return ranges
