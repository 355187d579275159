"""The command line: ``fastshard generate``, ``plan``, ``bench``, ``bench compare``, ``bench plot``,
``tune``, ``profile``, ``archive`` and its commands, ``info`` and ``completion``.

Of ``generate`` only the text goes to stdout; progress, figures and errors go to stderr. Exit
status: 0, 2 where the command line is wrong, 1 for everything else that fails.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import fastshard
from fastshard import generate_command, plan_command
from fastshard.archive import arguments as archive_arguments
from fastshard.arguments import (
    DTYPES,
    PLOT_FORMATS,
    Parser,
    count,
    layers,
    number,
    seconds,
    timeout,
    whole,
)
from fastshard.bench import arguments as bench_arguments
from fastshard.completion import SHELLS, script
from fastshard.decode import MODES
from fastshard.environment import emits_nvtx
from fastshard.progress import Progress
from fastshard.token_loop import DEFAULT_PREFILL_CHUNK_SIZE

_SORTS = ("time", "name")
_STRATEGIES = ("evolve", "random", "all")


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
    """Like ``bench compare`` and ``archive list``, some commands have names of two words."""
    name = " ".join(arguments[:2])
    is_one = name in bench_arguments.COMMANDS or name in archive_arguments.COMMANDS
    return [name, *arguments[2:]] if is_one else arguments


def _show_warning(message: Warning | str, *where) -> None:
    print(f"fastshard: warning: {message}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastshard", description=fastshard.__doc__)
    parser.add_argument("--version", action="version", version=fastshard.__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    plan_command.add_command(commands)
    bench_arguments.add_commands(commands)
    _add_tune(commands)
    _add_profile(commands)
    archive_arguments.add_commands(commands)
    info = commands.add_parser("info", help="what is installed, compiled and visible")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "--kernels",
        action="store_true",
        help="list what each compiled kernel takes (needs cuobjdump and nvdisasm)",
    )
    info.set_defaults(run=run_info)
    completion = commands.add_parser(
        "completion",
        help="write a completion script for a shell",
        description="Print a script that completes commands and options. Keep it where the shell "
        "looks: ~/.local/share/bash-completion/completions/fastshard, a file _fastshard in a "
        "folder of zsh's fpath, ~/.config/fish/completions/fastshard.fish.",
    )
    completion.add_argument("shell", choices=tuple(SHELLS), help="whose")
    completion.set_defaults(run=run_completion)
    return parser


def _add_generate(commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue PROMPT and print the text as it comes. Many GPUs, each with part of "
        "the layers: torchrun --nproc-per-node N -m fastshard generate ...",
    )
    generate.set_defaults(run=generate_command.run)
    add = generate.add_argument
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="text to continue; - reads it from stdin"
    )
    prompts.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="continue each line; of a .jsonl each line is a JSON string. Prints a line of JSON a "
        "prompt, in their order",
    )
    add("--model", metavar="DIR|HUB_ID", help="checkpoint (default: the embedded demo model)")
    split = generate.add_mutually_exclusive_group()
    split.add_argument("--shards", type=count, metavar="N", help="cut the layers into N shards")
    split.add_argument(
        "--layers",
        type=layers,
        metavar="A-B,C-D",
        help="layers of each shard, with torchrun of each rank, ends included",
    )
    add(
        "--tp",
        type=count,
        metavar="N",
        default=1,
        help="with torchrun: N ranks in turn share their layers, each a part of every one; "
        "--layers is then for each N ranks (default: 1)",
    )
    add(
        "--in-flight",
        type=count,
        metavar="N",
        help="prompts that are generated in turns (default: 1, with torchrun 2 a rank)",
    )
    add(
        "--timeout",
        type=timeout,
        metavar="T",
        default=300.0,
        help="with torchrun: end a run that hangs within T, like 90s or 10m (default: 5m)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: the GPU, if this build serves one)")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, else the checkpoint's 16 bit")
    add("--max-new-tokens", type=count, metavar="N", default=128, help="default: 128")
    sampled = "(default: as the checkpoint says, or"
    add("--temperature", type=number, metavar="T", help=f"0 is greedy {sampled} 0)")
    add("--top-k", type=whole, metavar="K", help=f"only the K likeliest tokens {sampled} all)")
    add("--top-p", type=number, metavar="P", help=f"only the likeliest of sum P {sampled} 1)")
    add("--min-p", type=number, metavar="P", help=f"only P times the likeliest {sampled} 0)")
    add("--seed", type=whole, default=0, help="the same seed gives the same text (default: 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--chat", action="store_true", help="put the prompt into the chat template")
    add("--decode", choices=MODES, help="default: FASTSHARD_DECODE, else auto")
    add(
        "--prefill-chunk-size",
        type=count,
        metavar="N",
        default=DEFAULT_PREFILL_CHUNK_SIZE,
        help="tokens of the prompt at a time, for less memory (default: %(default)s)",
    )


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
    add("--dtype", choices=DTYPES[1:], default="bfloat16", help="default: bfloat16")
    add("--budget", metavar="T", type=seconds, default=120.0, help="like 90s or 5m (default: 2m)")
    add("--seed", metavar="N", type=whole, default=0, help="default: 0")
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
    add("--plot", metavar="FILE", help=f"draw the gain over time, {PLOT_FORMATS}")
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
    with Progress(f"tuning {args.model}") as progress:
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
    profile.wraps = True
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


def run_info(args: argparse.Namespace) -> int:
    from fastshard.info import describe, format_text

    if args.kernels:
        return _list_kernels(args.json)
    facts = describe()
    print(json.dumps(facts, indent=2) if args.json else format_text(facts))
    return 0


def run_completion(args: argparse.Namespace) -> int:
    print(script(build_parser(), args.shell), end="")
    return 0


def _list_kernels(as_json: bool) -> int:
    from fastshard.bench import kernels

    compiled = kernels.describe()
    if compiled["missing"]:
        raise RuntimeError("; ".join(compiled["missing"]))
    print(json.dumps(compiled, indent=2) if as_json else "\n".join(kernels.lines(compiled)))
    return 0
