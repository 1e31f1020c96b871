"""Finds the backbone in a file of weights.

Training programs save a network under a prefix (`state_dict.model.`, `encoder_q.`,
`teacher.backbone.`), often together with other networks. A part of a file is all keys with one
prefix.
"""

import re
from collections import Counter
from dataclasses import dataclass

from afa.errors import UserError, nearest
from afa.models.pretrained import names
from afa.models.pretrained.names import Arrays

# If several parts fit equally well, the first one is used, but these only after the others: of
# such a pair of networks, the other one is the published one.
SECOND = re.compile(r"(^|\.)(student|encoder_k|momentum_encoder)\.")
SHOWN = 8  # parts in an error message


@dataclass(frozen=True)
class Part:
    """The part of a file that holds a backbone.

    Attributes:
      prefix: prefix of its keys, such as "state_dict.encoder_q."; "" for the whole file.
      arrays: parameter name, as ours -> values.
      library: library whose parameter names the file has.
      hits: number of keys that the backbone has too.
      outside: keys of the file without the prefix.
      others: prefixes of parts that fit equally well.
    """

    prefix: str
    arrays: Arrays
    library: str
    hits: int
    outside: tuple[str, ...]
    others: tuple[str, ...]


def find(arrays: Arrays, family: str, wanted: frozenset[str], chosen: str = "") -> Part:
    """Finds the part with the most parameters of a backbone.

    Args:
      arrays: key of the file -> values.
      family: family of the backbone.
      wanted: published names of the parameters of the backbone.
      chosen: prefix of the part to search; "" for the whole file.

    Raises:
      UserError: no key has the prefix `chosen`.
    """
    root = f"{chosen.rstrip('.')}." if chosen else ""
    if not _with_prefix(arrays, root):
        known = listed(arrays)
        raise UserError(
            f"backbone.part={chosen!r} is not a part of the file{nearest(chosen, known)} "
            f"(parts: {', '.join(known[:SHOWN]) or 'none'})"
        )
    best = -1
    equal: list[tuple[str, Arrays, str]] = []
    queue = [root]
    while queue:
        prefix = queue.pop(0)
        inside = _with_prefix(arrays, prefix)
        if len(inside) < best:
            continue
        named, library = names.translated(inside, family)
        hits = len(wanted & named.keys())
        if hits > best:
            best, equal = hits, []
        if hits == best and not any(prefix.startswith(found) for found, *_ in equal):
            equal.append((prefix, named, library))
        heads = dict.fromkeys(name.partition(".")[0] for name in inside if "." in name)
        queue += [f"{prefix}{head}." for head in heads]
    equal.sort(key=lambda found: SECOND.search(found[0]) is not None)
    prefix, named, library = equal[0]
    outside = tuple(name for name in arrays if not name.startswith(prefix))
    return Part(prefix, named, library, best, outside, tuple(each for each, *_ in equal[1:]))


def listed(arrays: Arrays) -> list[str]:
    """Returns the prefixes of one or two words that several tensors share, most common first."""
    counts: Counter[str] = Counter()
    for name in arrays:
        words = name.split(".")
        counts.update(".".join(words[:depth]) for depth in (1, 2) if len(words) > depth)
    return [prefix for prefix, count in counts.most_common() if count > 1]


def _with_prefix(arrays: Arrays, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
