"""Adapters for models of other libraries: ``accelerate(model)`` and ``undo(model)`` of each."""
