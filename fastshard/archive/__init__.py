"""``fastshard archive``: kernels of the AI CUDA Engineer Archive, verified before belief.

What is published of a kernel is a claim. The files, in the order in which a row meets them:

- rows: ``schema`` (what one is), ``source`` (where they come from), ``catalog`` (finding and
  showing them);
- distrust: ``sandbox`` (a process without rights) with its ``jail`` and ``processes``, ``compile``,
  ``foreign`` (asking such a process);
- one kernel: ``verify``, which holds a ``trial`` for each dtype; in their own sandboxes
  ``candidate`` (calls the kernel) and ``reference`` (makes inputs and right answers, by ``cases``;
  times ``peers``); both by ``timing``, and by files of ``trees``; ``rules`` (what rejects it);
- after that: ``verdict`` (what came out), ``report`` (claimed against verified), ``promote`` with
  ``wrapper`` (a verified kernel as one more choice of the tuner);
- the commands: ``arguments``, ``command`` (those that only read), ``verify_command``.
"""
