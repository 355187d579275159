"""``fastshard tune``: find the fastest compiled variant of each kernel on this device.

A run goes through these files in order: ``problem`` (what is tuned), ``space`` (which variants are
legal), ``model`` (what they cost on paper), ``search`` (which of them are measured next),
``measure`` (how, in a process of its own), ``recorded`` (measurements kept on disk, and played
back), ``confirm`` (what won, once more), ``table`` (what becomes of the entries there are),
``command``. What wins is written as a table of ``fastshard.ops.variants``, by which the kernels are
chosen.

With ``--patch`` the space is larger than the wheel's ``menu``: ``compiler`` makes ``instances`` of
what is measured, by ``nvcc``, and what wins is a ``patch`` of the menu.
"""
