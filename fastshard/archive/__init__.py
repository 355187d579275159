"""``fastshard archive``: kernels of the AI CUDA Engineer Archive, verified before belief.

What is published of a kernel is a claim. A row goes through these files in order: ``schema`` (what
a row is), ``source`` (where rows come from), ``catalog`` (finding and showing them), ``sandbox``
and ``compile`` (foreign code in a process that is distrusted), ``candidate``, ``rules`` and
``verify`` (whether it computes what it says, and how fast), ``verdict`` (what came out), ``report``
(claimed against verified), ``promote`` (a verified kernel as one more choice of the tuner).
"""
