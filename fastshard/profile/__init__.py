"""Where the time of a command goes: ``fastshard profile``, and names of layers for profilers.

``command`` runs and prints, ``recorded`` reads what the profiler saw, ``table`` is the figures of
it, ``limits`` what each op would take at best, ``ranges`` names the layers.
"""

from fastshard.profile.ranges import ranges

__all__ = ["ranges"]
