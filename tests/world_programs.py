"""What the ranks of tests/dist/test_world.py run."""

import time

import torch
import torch.distributed as dist

from fastshard.dist import MAX_TOKENS, connect, join_world


def describe(tp: int) -> dict:
    """This rank's place, and what all ranks say of theirs."""
    with join_world(tp=tp) as world:
        groups = world.groups
        tensor = None if groups.tensor is None else dist.get_process_group_ranks(groups.tensor)
        return {
            "rank": world.rank,
            "size": world.size,
            "stage": (world.stage, world.num_stages),
            "tp_index": world.tp_index,
            "ends": (world.is_first_stage, world.is_last_stage),
            "next": world.next_rank,
            "previous": world.previous_rank,
            "tensor": tensor,
            "forward": dist.get_process_group_ranks(groups.forward),
            "is_apart": groups.forward is not groups.back,
            "uses_nccl": world.uses_nccl,
            "num_sharing": world.num_sharing,
            "gathered": world.gather({"rank": world.rank, "of": tensor}),
        }


def use_the_store() -> list[str]:
    """Keys of others beside those of the groups."""
    with join_world() as world:
        store = dist.PrefixStore("mine", world.store)
        store.set(f"{world.rank}", f"from {world.rank}")
        return [store.get(f"{rank}").decode() for rank in range(world.size)]


def is_initialized(fails: bool) -> list[bool]:
    """Whether torch.distributed is, inside a world and behind it."""
    inside = False
    try:
        with join_world():
            inside = dist.is_initialized()
            if fails:
                raise LookupError
    except LookupError:
        pass
    return [inside, dist.is_initialized()]


def join_with_tp(tp: int) -> str:
    """The error of a world that cannot be."""
    try:
        join_world(tp=tp).close()
    except ValueError as error:
        return str(error)
    return "joined"


def messages_in_each_group() -> list[float]:
    """What arrives from the other rank where each group's is received before the others'."""
    with join_world() as world:
        other = world.next_rank
        groups = [world.groups.back, world.groups.forward]
        sent = [
            dist.isend(torch.full((2,), float(10 * i + world.rank)), other, group=group)
            for i, group in enumerate(groups)
        ]
        received = []
        for group in reversed(groups):
            into = torch.zeros(2)
            dist.irecv(into, other, group=group).wait()
            received.append(into.tolist()[0])
        for work in sent:
            work.wait()
        return received


def send_ahead() -> list:
    """Three tensors are on their way before the next rank takes any; what each rank got and sent.

    Around the ring of stages: hidden states forward, tokens back.
    """
    with join_world() as world:
        hops = connect(world)
        hop = hops.forward if not world.is_last_stage else hops.back
        values = [torch.full((1, 2, 3), 10.0 * world.rank + i) for i in range(3)]
        for value in values:
            hop.send(value, num_tokens=2, max_on_their_way=3)
        world.gather(None)  # everyone has sent, and nobody has received
        source = hops.back if world.is_first_stage else hops.forward
        into = torch.zeros(4, 2, 3)
        got = [source.receive(into[:1]).flatten().tolist() for _ in range(3)]
        hop.finish()
        return [got, hops.forward.sent, hops.back.sent, into[1:].any().item()]


def send_over_nccl() -> tuple[list[int], bool]:
    """Of two ranks with a GPU each: the tokens that rank 0 got, and whether the hidden states came.

    Tokens leave before rank 0 receives any. Hidden states are of all sizes, and of static buffers
    that are written again as soon as the stream may.
    """
    with join_world(device="cuda") as world:
        assert world.uses_nccl
        hops, tokens, are_right = connect(world), [], True
        if world.is_last_stage:
            for i in range(MAX_TOKENS):
                token = torch.full((1,), i, dtype=torch.int64, device=world.device)
                hops.back.send(token, num_tokens=1, max_on_their_way=0)
            _await_gpu(20)
        world.gather(None)
        if world.is_first_stage:
            into = torch.zeros(1, dtype=torch.int64, device=world.device)
            tokens = [hops.back.receive(into).item() for _ in range(MAX_TOKENS)]
        for num_tokens in (1, 3, 700):
            x = torch.empty(1, num_tokens, 8192, dtype=torch.bfloat16, device=world.device)
            for i in range(30):
                if world.is_first_stage:
                    hops.forward.send(x.fill_(i), num_tokens=num_tokens, max_on_their_way=0)
                else:
                    are_right = hops.forward.receive(x).eq(i).all().logical_and(are_right)
        return tokens, bool(are_right)


def _await_gpu(seconds: float) -> None:
    """Fail where what was launched is not done by then."""
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + seconds
    while not event.query():
        assert time.monotonic() < end, f"the GPU is not done after {seconds} s"


def hops_of_one_stage() -> bool:
    """Whether ranks that share all layers have no hops."""
    with join_world(tp=2) as world:
        return connect(world) is None
