"""Command lines of ``fastshard archive`` and its commands."""

import argparse
from pathlib import Path

from fastshard.arguments import DTYPES, PLOT_FORMATS, argument, number, seconds, whole

LEVELS = ("1", "2", "3")
OPS = ("batched_matmul", "matmul", "softmax", "rmsnorm", "layernorm", "attention", "mlp")
SPLITS = ("level_1", "level_2", "level_3")
COMMANDS = (
    "archive fetch",
    "archive list",
    "archive show",
    "archive verify",
    "archive report",
    "archive promote",
    "archive demote",
)
"""Commands whose names are two words."""


@argument("a level of the archive, 1, 2 or 3", choices=LEVELS)
def level(text: str) -> int:
    if text not in LEVELS:
        raise ValueError
    return int(text)


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Add ``archive`` and its commands."""
    archive = commands.add_parser(
        "archive",
        help="verify kernels of the AI CUDA Engineer Archive before they are used",
        description="Say what was fetched and verified. The commands: "
        f"{', '.join(name.split()[1] for name in COMMANDS)}, each with --help.",
    )
    archive.set_defaults(run=run_archive)
    _add_fetch(commands)
    _add_list(commands)
    _add_show(commands)
    _add_verify(commands)
    _add_report(commands)
    _add_promote(commands)
    _add_demote(commands)


def add_filters(add) -> None:
    """The options that choose rows."""
    add("--op", choices=OPS, help="kernels of this kind alone")
    add("--level", type=level, metavar="N", help="of this level alone")
    add("--min-speedup", type=number, metavar="X", help="that claim to be X times as fast as eager")


def _add_fetch(commands) -> None:
    fetch = commands.add_parser(
        "archive fetch",
        help="copy the archive into the cache",
        description="Copy the archive's parquet files into the cache: from the Hugging Face hub, "
        "or, without network, from --source. Needs pyarrow: the extra archive.",
    )
    fetch.set_defaults(run=run_fetch)
    add = fetch.add_argument
    add("--source", metavar="DIR|FILE", help="a parquet file or a folder of them, not the hub")
    add("--split", nargs="+", metavar="SPLIT", default=SPLITS, help="like level_1 (default: all)")
    add("--revision", metavar="COMMIT", help="of the hub (default: its newest)")


def _add_list(commands) -> None:
    list_ = commands.add_parser(
        "archive list",
        help="list kernels and what is claimed of them",
        description="One line a kernel, by task, the largest claimed speed-up first.",
    )
    list_.set_defaults(run=run_list)
    add_filters(list_.add_argument)


def _add_show(commands) -> None:
    show = commands.add_parser(
        "archive show",
        help="show a kernel: claims, code, profile, licence, attribution",
        description="Print everything that the archive has of one kernel. Nothing is run.",
    )
    show.set_defaults(run=run_show)
    show.add_argument("id", metavar="ID", help="as archive list shows it, or its beginning")


def _add_report(commands) -> None:
    report = commands.add_parser(
        "archive report",
        help="put claimed and verified speed-ups beside each other",
        description="A table of every kernel that was verified on this machine: what was claimed, "
        "what was found, and why the others were rejected.",
    )
    report.set_defaults(run=run_report)
    add = report.add_argument
    add("--op", choices=OPS, help="kernels of this kind alone")
    add("--plot", metavar="FILE", help=f"draw the same, {PLOT_FORMATS}")


def _add_verify(commands) -> None:
    verify = commands.add_parser(
        "archive verify",
        help="compile kernels, hold them to PyTorch, time them",
        description="Compile and run kernels of the archive, which are foreign native code, each "
        "in a sandbox, beside the PyTorch code of their rows, and keep a verdict of each. Needs "
        "a C++ compiler, ninja and, for CUDA code, nvcc and a GPU.",
    )
    verify.set_defaults(run=run_verify)
    add = verify.add_argument
    add("ids", metavar="ID", nargs="*", help="as archive list shows them, or their beginnings")
    add_filters(add)
    add(
        "--i-trust-this-code",
        action="store_true",
        help="compile and run it on this machine; without this nothing is",
    )
    add(
        "--without-network-isolation",
        action="store_true",
        help="run it also where the network cannot be taken away from it",
    )
    add("--device", help="cpu, cuda or cuda:N (default: the GPU, if there is one)")
    add("--timeout", type=seconds, metavar="TIME", default=120.0, help="of a call (default: 120s)")
    add("--memory", type=number, metavar="GB", default=32.0, help="of a process (default: 32)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    add(
        "--jobs",
        type=whole,
        metavar="N",
        default=1,
        help="sources that are compiled while a kernel is tried, on a GPU: each takes a core and "
        "3 GB (default: 1)",
    )
    add("--again", action="store_true", help="also what has a verdict of this code")
    add("--seed", type=whole, default=0, help="of the inputs (default: 0)")


def _add_promote(commands) -> None:
    promote = commands.add_parser(
        "archive promote",
        help="keep a verified kernel that beats ours as a candidate of tune",
        description="Compile a verified kernel as a variant of the op of ours that means the same, "
        "measure it beside ours at the shapes of a model, and keep it in the cache where it is "
        "faster: fastshard tune may choose it from then on. Of RMSNorm and LayerNorm.",
    )
    promote.set_defaults(run=run_promote)
    add = promote.add_argument
    add("id", metavar="ID", help="as archive list shows it, or its beginning")
    add("--model", metavar="PRESET|DIR", default="llama-3.1-8b", help="default: %(default)s")
    add("--dtype", choices=DTYPES[1:], nargs="+", default=DTYPES[1:], help="default: both")
    add(
        "--i-trust-this-code",
        action="store_true",
        help="run it outside of a sandbox, where fastshard runs; without this nothing is done",
    )


def _add_demote(commands) -> None:
    demote = commands.add_parser(
        "archive demote",
        help="delete a promoted kernel",
        description="Delete a promoted kernel, and the entries of the user's tables that name it.",
    )
    demote.set_defaults(run=run_demote)
    demote.add_argument("id", metavar="ID", help="as promote had it, or the variant's name")


def run_archive(args: argparse.Namespace) -> int:
    from fastshard.archive import command

    return command.say_state(print)


def run_fetch(args: argparse.Namespace) -> int:
    from fastshard.archive import command

    source = args.source and Path(args.source)
    return command.fetch(source, splits=args.split, revision=args.revision, say=print)


def run_list(args: argparse.Namespace) -> int:
    from fastshard.archive import command

    return command.list_rows(op=args.op, level=args.level, min_speedup=args.min_speedup, say=print)


def run_show(args: argparse.Namespace) -> int:
    from fastshard.archive import command

    return command.show(args.id, say=print)


def run_report(args: argparse.Namespace) -> int:
    from fastshard.archive import command

    return command.report(op=args.op, plot_path=args.plot and Path(args.plot), say=print)


def run_verify(args: argparse.Namespace) -> int:
    from fastshard.archive import verify_command

    return verify_command.run(
        args.ids,
        op=args.op,
        level=args.level,
        min_speedup=args.min_speedup,
        trusts_code=args.i_trust_this_code,
        without_network_isolation=args.without_network_isolation,
        device=args.device,
        timeout=args.timeout,
        memory_gb=args.memory,
        compiles=not args.no_compile,
        jobs=args.jobs,
        again=args.again,
        seed=args.seed,
        say=print,
    )


def run_promote(args: argparse.Namespace) -> int:
    from fastshard.archive.promote import promote

    promote(
        args.id,
        trusts=args.i_trust_this_code,
        model_name=args.model,
        dtypes=args.dtype,
        say=lambda line: print(line, flush=True),
    )
    return 0


def run_demote(args: argparse.Namespace) -> int:
    from fastshard.archive.promote import demote

    print(f"{demote(args.id).name} is deleted")
    return 0
