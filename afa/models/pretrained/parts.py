"""Where in a file of weights a backbone is.

Trainers put a network beneath other names (`state_dict.model.`, `encoder_q.`, `teacher.backbone.`)
and other networks beside it. A part of a file is what stands beneath one such prefix.
"""

import re
from collections import Counter
from dataclasses import dataclass

from afa.errors import UserError, nearest
from afa.models.pretrained import names
from afa.models.pretrained.names import Arrays

# Of two parts that fit equally well the first in the file is taken, but none of these before its
# counterpart, which is the one that is published.
SECOND = re.compile(r"(^|\.)(student|encoder_k|momentum_encoder)\.")
SHOWN = 8  # parts that an error names


@dataclass(frozen=True)
class Part:
    """The part of a file that has a backbone.

    Attributes:
      prefix: what stands before every name: "state_dict.encoder_q.", or "" of a whole file.
      arrays: by our published names.
      library: whose names the file has.
      hits: number of names that the backbone has too.
      outside: names of the file that do not begin so.
      others: prefixes of parts that fit as well.
    """

    prefix: str
    arrays: Arrays
    library: str
    hits: int
    outside: tuple[str, ...]
    others: tuple[str, ...]


def find(arrays: Arrays, family: str, wanted: frozenset[str], chosen: str = "") -> Part:
    """The part with the most names of a backbone.

    Args:
      arrays: the file's own name -> values.
      family: of the backbone.
      wanted: published names of its parameters.
      chosen: prefix of the part to search in; "" is the whole file.

    Raises:
      UserError: nothing stands beneath `chosen`.
    """
    root = f"{chosen.rstrip('.')}." if chosen else ""
    if not _below(arrays, root):
        known = listed(arrays)
        raise UserError(
            f"backbone.part={chosen!r} is no part of the file{nearest(chosen, known)} "
            f"(there are: {', '.join(known[:SHOWN]) or 'none'})"
        )
    best = -1
    equal: list[tuple[str, Arrays, str]] = []
    waiting = [root]
    while waiting:
        prefix = waiting.pop(0)
        inside = _below(arrays, prefix)
        if len(inside) < best:
            continue
        named, library = names.translated(inside, family)
        hits = len(wanted & named.keys())
        if hits > best:
            best, equal = hits, []
        if hits == best and not any(prefix.startswith(found) for found, *_ in equal):
            equal.append((prefix, named, library))
        heads = dict.fromkeys(name.partition(".")[0] for name in inside if "." in name)
        waiting += [f"{prefix}{head}." for head in heads]
    equal.sort(key=lambda found: SECOND.search(found[0]) is not None)
    prefix, named, library = equal[0]
    outside = tuple(name for name in arrays if not name.startswith(prefix))
    return Part(prefix, named, library, best, outside, tuple(each for each, *_ in equal[1:]))


def listed(arrays: Arrays) -> list[str]:
    """The prefixes, of one or two names, that at least two tensors share; the most common first."""
    counts: Counter[str] = Counter()
    for name in arrays:
        words = name.split(".")
        counts.update(".".join(words[:depth]) for depth in (1, 2) if len(words) > depth)
    return [prefix for prefix, count in counts.most_common() if count > 1]


def _below(arrays: Arrays, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
