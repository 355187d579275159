"""What a type checker sees of the public names: nothing missing, and calls that users make fit."""

import inspect
import re
import types
from collections.abc import Iterator

import pytest

import fastshard
from fastshard import nn, ops
from fastshard.decode import WholeModel
from fastshard.generate import TextGenerator
from fastshard.loading import TextModel

BARE = re.compile(r"\b(dict|list|tuple|Mapping|Sequence|Callable|Iterator)\b(?!\[)")
PUBLIC = [
    getattr(module, name)
    for module in (fastshard, ops, nn)
    for name in module.__all__
    if isinstance(getattr(module, name), (type, types.FunctionType))
]


def functions_of(thing: object) -> Iterator[tuple[str, types.FunctionType]]:
    """The function itself, or the public methods that a class of ours defines."""
    if isinstance(thing, types.FunctionType):
        yield thing.__qualname__, thing
        return
    for cls in thing.__mro__:
        if not cls.__module__.startswith("fastshard"):
            continue
        for name, member in vars(cls).items():
            member = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            is_public = not name.startswith("_") or name in ("__init__", "__iter__", "__next__")
            if isinstance(member, types.FunctionType) and is_public:
                yield f"{cls.__name__}.{name}", member


def gaps(name: str, function: types.FunctionType) -> list[str]:
    """Annotations that are missing, or generic without what they hold."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if "." in function.__qualname__.split("<locals>.")[-1] and parameters:
        parameters = parameters[1:]  # self or cls
    named = {parameter.name: parameter.annotation for parameter in parameters}
    if not name.endswith("__init__"):
        named["return"] = signature.return_annotation
    return [
        f"{name}: {parameter}"
        for parameter, annotation in named.items()
        if annotation is inspect.Parameter.empty
        or BARE.search(inspect.formatannotation(annotation))
    ]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_annotations_are_whole(thing):
    assert [gap for pair in functions_of(thing) for gap in gaps(*pair)] == []


def test_a_gap_is_found():
    def f(a, b: dict, c: int, d: dict[str, int]) -> list:
        return [a, b, c, d]

    assert gaps("f", f) == ["f: a", "f: b", "f: return"]


@pytest.mark.parametrize("model", [fastshard.ShardedGeneralModel, fastshard.ShardChain, TextModel])
def test_models_fit_generate_batch(model):
    """By keyword, with the types of the protocol; a chain hands any keyword on."""
    asked = inspect.signature(WholeModel.generate).parameters
    given = inspect.signature(inspect.unwrap(model.generate)).parameters
    for name, parameter in asked.items():
        if name in given:
            kept = inspect.formatannotation(parameter.annotation)
            assert kept in inspect.formatannotation(given[name].annotation)
        else:
            assert "arguments" in given, name
    assert "device" in dir(model)


def test_a_loaded_model_keeps_the_signature_of_stream():
    assert TextModel.stream is TextGenerator.stream
    assert "max_new_tokens" in inspect.signature(fastshard.ShardChain.stream).parameters
