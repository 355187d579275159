"""What ``fastshard tune`` says."""

from collections.abc import Sequence

from fastshard.ops.variants import Entry
from fastshard.tune import table
from fastshard.tune.search import NEAR_LIMIT, Found, Generation, mean_gain


def generation_line(generation: Generation) -> str:
    """What one generation of a problem found."""
    found = generation.found
    name, ratio = found.best
    measured = len(found.measured)
    return (
        f"{generation.spent:7.1f} s  generation {generation.number:<2} "
        f"{found.problem!s:<52} {generation.new} new of {measured}, "
        f"{len(found.left_out)} left out, best {name} {1 / ratio:.3f}x"
    )


def summary(
    founds: Sequence[Found], entries: Sequence[Entry], additions: Sequence[Entry]
) -> list[str]:
    """A line for each entry of the table and each addition to the menus, and the whole gain."""
    lines = []
    for entry in (*entries, *additions):
        found = next(each for each in founds if table.key(each.problem) == table.key(entry))
        best = found.measured[entry.variant]
        lines.append(
            f"{found.problem!s:<52} {entry.variant:<14} {best.us:9.2f} us, "
            f"auto {best.auto_us:9.2f} us, {best.auto_us / best.us:.3f}x"
            + (", not in the menu" if entry in additions else "")
        )
    tried = [found for found in founds if found.measured]
    far = [found for found in tried if not found.is_near_limit]
    lines.append(
        f"geometric mean of auto / best: {mean_gain(tried):.4f} of {len(tried)} problems, "
        f"{mean_gain(far):.4f} of the {len(far)} that are not within "
        f"{100 * (NEAR_LIMIT - 1):.0f} % of the device's limit"
    )
    return lines
