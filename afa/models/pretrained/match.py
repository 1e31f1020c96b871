"""Between parameters by published names, in PyTorch's order of axes, and the variables of a
backbone."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import PyTree

from afa.errors import UserError
from afa.models.pretrained.names import Arrays

Path = tuple[str, ...]

LEAVES = {  # leaf of a parameter of ours -> the last part of its published name
    "kernel": "weight",
    "scale": "weight",
    "clean_mean": "running_mean",
    "clean_var": "running_var",
}
OWN = re.compile(r"adversarial_.*")  # leaves of the adversarial branch, which no file has
IGNORED = re.compile(r".*\.num_batches_tracked|mask_token")  # counters; tokens of pre-training
SHOWN = 6  # names of each kind in an error


def published(path: Path) -> str:
    """("layer1.0", "conv1", "kernel") -> "layer1.0.conv1.weight"."""
    return ".".join((*path[:-1], LEAVES.get(path[-1], path[-1])))


def leaves(variables: Mapping[str, PyTree]) -> Iterator[tuple[str, Path, Any]]:
    """Every parameter and statistic that a file can have: collection, path, value."""

    def below(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if isinstance(tree, Mapping):
            for name, branch in tree.items():
                yield from below(branch, (*path, name))
        else:
            yield path, tree

    for collection, tree in variables.items():
        for path, value in below(tree, ()):
            if not OWN.fullmatch(path[-1]):
                yield collection, path, value


def to_ours(value: np.ndarray, path: Path) -> np.ndarray:
    """Kernels from (out, in, y, x) to (y, x, in, out), and from (out, in) to (in, out)."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_theirs(value: np.ndarray, path: Path) -> np.ndarray:
    """The inverse of `to_ours`."""
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


@dataclass(frozen=True)
class Account:
    """What became of every parameter.

    Attributes:
      loaded: published names that were taken over.
      missing: names the backbone has and the file has not.
      unmatched: names the file has and the backbone has not.
      reshaped: "name: (shape in the file) -> (shape here)", which are not taken over.
      aside: names of the file that the backbone is known to do without.
      unusable: "name: reason" of loaded names whose values no network can work with.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unmatched: tuple[str, ...]
    reshaped: tuple[str, ...]
    aside: tuple[str, ...]
    unusable: tuple[str, ...] = ()

    def refuse(self, allowed: Iterable[str], field: str) -> None:
        """Refuses what does not fit and is not allowed to.

        Args:
          allowed: regular expressions of names.
          field: what the user said, for the error.

        Raises:
          UserError: listing every kind of misfit.
        """
        fits = _pattern(allowed)
        told = []
        for kind in ("missing", "unmatched", "reshaped"):
            names = [n for n in getattr(self, kind) if not fits(n.split(":")[0])]
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                told.append(f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
        if not self.loaded:
            told.append("nothing fits")
        if told:
            raise UserError(
                f"{field} does not fit: {'; '.join(told)} "
                "(backbone.allow_partial names what may be left out)"
            )
        if self.unusable:
            first, *rest = self.unusable
            more = f" (and {len(rest)} more)" if rest else ""
            raise UserError(f"{field}: {first.replace(': ', ' ', 1)}{more}")


def _pattern(allowed: Iterable[str]) -> Callable[[str], bool]:
    expressions = []
    for each in allowed:
        try:
            expressions.append(re.compile(each))
        except re.error as error:
            raise UserError(
                f"backbone.allow_partial={each!r} is no regular expression ({error})"
            ) from None
    return lambda name: any(e.fullmatch(name) for e in expressions)


def fill(
    variables: Mapping[str, PyTree], arrays: Arrays, aside: str
) -> tuple[dict[str, PyTree], Account]:
    """The variables with every array that fits, as float32; of BatchNorm both branches.

    Args:
      variables: {"params", "batch_stats"} of the backbone.
      arrays: by our published names (`names.translated`).
      aside: regular expression of the arrays the backbone does without.
    """
    new = {collection: _copy(tree) for collection, tree in variables.items()}
    found, missing, reshaped, unusable = [], [], [], []
    for collection, path, value in leaves(variables):
        name = published(path)
        if name not in arrays:
            missing.append(name)
            continue
        array = to_ours(_squeezed(arrays[name], path, value.ndim), path)
        if array.shape != value.shape:
            reshaped.append(f"{name}: {arrays[name].shape} -> {_theirs(value, path)}")
            continue
        found.append(name)
        if reason := _unusable(array, path[-1]):
            unusable.append(f"{name}: {reason}")
        with np.errstate(over="ignore"):  # told above
            array = np.ascontiguousarray(np.real(array), dtype=np.float32)
        _put(new[collection], path, array)
        if path[-1].startswith("clean_"):
            _put(new[collection], (*path[:-1], path[-1].replace("clean_", "adversarial_")), array)
    known = {*found, *missing, *(each.split(":")[0] for each in reshaped)}
    rest = [name for name in arrays if name not in known and not IGNORED.fullmatch(name)]
    skipped = [name for name in rest if re.fullmatch(aside, name)]
    return new, Account(
        tuple(found),
        tuple(missing),
        tuple(name for name in rest if name not in skipped),
        tuple(reshaped),
        tuple(skipped),
        tuple(unusable),
    )


def _unusable(array: np.ndarray, leaf: str) -> str:
    """Why a parameter cannot have these values; "" where it can."""
    if array.dtype.kind in "iubc":  # those of ml_dtypes are of kind V
        return f"is of type {array.dtype}, not of floating-point numbers"
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        return "is not finite"
    return "is below 0" if leaf == "clean_var" and (values < 0).any() else ""


def export(variables: Mapping[str, PyTree]) -> Arrays:
    """Published name -> array in PyTorch's order of axes: the inverse of `fill`, exactly."""
    return {
        published(path): np.ascontiguousarray(to_theirs(np.asarray(value), path))
        for _, path, value in leaves(variables)
    }


def _squeezed(array: np.ndarray, path: Path, rank: int) -> np.ndarray:
    """A dense kernel that the file has as a convolution over the whole map (timm's VGG)."""
    if path[-1] == "kernel" and rank == 2 and array.ndim == 4:
        return array.reshape(len(array), -1)
    return array


def _theirs(value: Any, path: Path) -> tuple[int, ...]:
    return to_theirs(np.broadcast_to(np.float32(0), value.shape), path).shape


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _put(tree: Any, path: Path, value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree[name]
    tree[path[-1]] = value
