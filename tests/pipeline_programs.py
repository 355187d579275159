"""What the ranks of tests/pipeline run."""

from fastshard.checkpoint import Checkpoint
from fastshard.dist import join_world
from fastshard.pipeline import Pipeline, Settings
from fastshard.sampling import Sampling

PROMPTS = [[40, 41, 42, 43, 44], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [11, 12], [13, 14, 15]]


class TokenRequest:
    """A prompt of tokens, and the tokens that follow it."""

    def __init__(self, prompt, max_new_tokens, sampling=None, ends=()):
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling()
        self.tokens = []
        self._ends = ends

    def accept(self, token):
        self.tokens.append(token)
        return token in self._ends


def run_tokens(pipeline, prompts, num_tokens, samplings=None, ends=()):
    """The tokens after each prompt."""
    samplings = samplings or [Sampling()] * len(prompts)
    requests = [
        TokenRequest(prompt, num_tokens, sampling, ends)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    for _ in pipeline._engine.run(requests):
        pass
    return [request.tokens for request in requests]


def run_cases(cases):
    """Each case: a path, settings, and calls of ``run_tokens``; returns what rank 0 got of each."""
    results = []
    with join_world() as world:
        for path, settings, calls in cases:
            if world.rank >= world.size:
                continue
            pipeline = Pipeline(Checkpoint(path), world, Settings(**settings))
            if world.rank == 0:
                results.append([run_tokens(pipeline, *call) for call in calls])
                pipeline.stop()
            else:
                assert pipeline.serve()
            hops = pipeline.hops()
            if world.rank == 0:
                results[-1].append(hops)
    return results
