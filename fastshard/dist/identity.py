"""What all ranks must have in common, and the error that names those that differ."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastshard.dist.verdict import RunError

_NO_LIMIT = timedelta(days=365)  # whoever watches the ranks ends a run that waits in vain
_MOST_NAMED = 3


def check_same(store: dist.Store, rank: int, size: int, facts: Mapping[str, Any]) -> None:
    """Raise on every rank where the ranks do not have the same facts; waits for all.

    Hashes are compared first: the facts themselves are read only where those differ.

    Args:
        store: The store of the run; keeps the facts under keys of its own.
        facts: Name, as the error says it, to a JSON value; None where this rank does not know,
            which agrees with everything. The first that differs is told in full.

    Raises:
        RunError: (a ``ValueError``) names what differs, and which rank has what.
    """
    store = dist.PrefixStore("fastshard facts", store)
    text = json.dumps(facts)
    store.set(f"facts {rank}", text)
    store.set(f"hash {rank}", hashlib.sha256(text.encode()).hexdigest())
    hashes = _read_all(store, "hash", size)
    if len(set(hashes)) == 1:
        return
    difference = describe_difference([json.loads(t) for t in _read_all(store, "facts", size)])
    if difference is not None:
        raise RunError(difference)


def describe_difference(facts: Sequence[Mapping[str, Any]]) -> str | None:
    """What the ranks do not have in common; None where there is nothing.

    Args:
        facts: One mapping a rank, in their order. A name that a rank lacks has the value "none".
    """
    names = dict.fromkeys(name for mapping in facts for name in mapping)
    differing = [name for name in names if len(_holders(facts, name)) > 1]
    if not differing:
        return None
    holders = _holders(facts, differing[0])
    parts = [f"{value} on {_ranks(ranks)}" for value, ranks in holders.items()]
    text = f"all ranks must have the same {differing[0]}, got " + ", ".join(parts)
    others = differing[1:]
    if others:
        more = ", ..." if len(others) > _MOST_NAMED else ""
        text += f"; {len(others)} more differ: {', '.join(others[:_MOST_NAMED])}{more}"
    return text


def _holders(facts: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[int]]:
    """Value, as text -> the ranks that have it; without those that do not know."""
    holders: dict[str, list[int]] = {}
    for rank, mapping in enumerate(facts):
        value = mapping.get(name, "none")
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            holders.setdefault(text, []).append(rank)
    return holders


def _ranks(ranks: Sequence[int]) -> str:
    """Like "rank 3" or "ranks 0-2,5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)
    return f"ranks {text}" if len(ranks) > 1 else f"rank {text}"


def _read_all(store: dist.Store, what: str, size: int) -> list[bytes]:
    keys = [f"{what} {rank}" for rank in range(size)]
    store.wait(keys, _NO_LIMIT)
    return store.multi_get(keys)
