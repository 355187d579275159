"""``fastshard`` as torchrun's ranks run it, but one rank has a fault: FAULT RANK ARGUMENTS..."""

import os
import sys
import time

import torch

import fastshard
from fastshard import cli, loading
from fastshard.pipeline.rank import PipelineRank


def plant(fault, arguments):
    """Change this process so that it fails as ``fault`` says."""
    if fault == "version":
        fastshard.__version__ = "0.0.1"
    elif fault == "checkpoint":
        at = arguments.index("--model") + 1
        arguments[at] += "-changed"
    elif fault == "option":
        arguments += ["--dtype", "bfloat16"]
    elif fault == "memory-loading":
        load_weights = loading.load_weights

        def load(*args, **keys):
            load_weights(*args, **keys)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        loading.load_weights = load
    else:
        do = PipelineRank.do
        num_done = 0

        def do_or_fail(self, command, tokens=()):
            nonlocal num_done
            do(self, command, tokens)
            num_done += 1
            if num_done == 20 and fault == "memory-running":
                raise MemoryError("cannot allocate 2 GiB")
            if num_done == 20 and fault == "stuck":
                time.sleep(3600)

        PipelineRank.do = do_or_fail


if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        plant(fault, arguments)
    sys.exit(cli.main(arguments))
