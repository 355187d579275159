"""Modules with torchtune 0.6.1's call contract and state-dict names, over ``fastshard.ops``."""

from fastshard.nn.rope import RopeScaling

__all__ = ["RopeScaling"]
