"""Converts between published parameters (PyTorch names and axis order) and the variables of a
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

LEAVES = {  # last part of our parameter name -> last part of the published name
    "kernel": "weight",
    "scale": "weight",
    "clean_mean": "running_mean",
    "clean_var": "running_var",
}
ADVERSARIAL = re.compile(r"adversarial_.*")  # parameters that published files do not have
IGNORED = re.compile(r".*\.num_batches_tracked|mask_token")  # counters; pretraining tokens
SHOWN = 6  # keys of each kind in an error message


def published(path: Path) -> str:
    """Returns the published name: ("layer1.0", "conv1", "kernel") -> "layer1.0.conv1.weight"."""
    return ".".join((*path[:-1], LEAVES.get(path[-1], path[-1])))


def leaves(variables: Mapping[str, PyTree]) -> Iterator[tuple[str, Path, Any]]:
    """Yields (collection, path, value) of every parameter and statistic that a file can have."""

    def below(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if isinstance(tree, Mapping):
            for name, branch in tree.items():
                yield from below(branch, (*path, name))
        else:
            yield path, tree

    for collection, tree in variables.items():
        for path, value in below(tree, ()):
            if not ADVERSARIAL.fullmatch(path[-1]):
                yield collection, path, value


def from_published(value: np.ndarray, path: Path) -> np.ndarray:
    """Transposes kernels from (out, in, y, x) to (y, x, in, out), and (out, in) to (in, out)."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_published(value: np.ndarray, path: Path) -> np.ndarray:
    """The inverse of `from_published`."""
    if path[-1] != "kernel":
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


@dataclass(frozen=True)
class LoadReport:
    """Result of loading weights, by published parameter name (key).

    Attributes:
      loaded: keys that were loaded.
      missing: keys of the backbone that are not in the file.
      unexpected: keys of the file that the backbone does not have.
      mismatched: "key: (shape in the file) -> (shape in the backbone)"; not loaded.
      ignored: keys of the file that the backbone is known not to use.
      invalid: "key: reason" of loaded keys with invalid values.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    ignored: tuple[str, ...]
    invalid: tuple[str, ...] = ()

    def check(self, allowed: Iterable[str], field: str) -> None:
        """Raises unless all keys fit or are allowed not to.

        Args:
          allowed: regular expressions of keys that need not fit.
          field: the setting and its value, for the error.

        Raises:
          UserError: missing, unexpected or mismatched keys, no loaded keys, or invalid values.
        """
        is_allowed = _pattern(allowed)
        problems = []
        for kind in ("missing", "unexpected", "mismatched"):
            names = [n for n in getattr(self, kind) if not is_allowed(n.split(":")[0])]
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                problems.append(f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
        if not self.loaded:
            problems.append("no key fits")
        if problems:
            raise UserError(
                f"{field} does not fit: {'; '.join(problems)} "
                "(backbone.allow_partial sets which keys need not fit)"
            )
        if self.invalid:
            first, *rest = self.invalid
            more = f" (and {len(rest)} more)" if rest else ""
            raise UserError(f"{field}: {first.replace(': ', ' ', 1)}{more}")


def _pattern(allowed: Iterable[str]) -> Callable[[str], bool]:
    expressions = []
    for each in allowed:
        try:
            expressions.append(re.compile(each))
        except re.error as error:
            raise UserError(
                f"backbone.allow_partial={each!r} is not a regular expression ({error})"
            ) from None
    return lambda name: any(e.fullmatch(name) for e in expressions)


def load_weights(
    variables: Mapping[str, PyTree], arrays: Arrays, ignored: str
) -> tuple[dict[str, PyTree], LoadReport]:
    """Loads all arrays that fit into the variables, as float32.

    BatchNorm statistics are loaded into both the clean and the adversarial branch.

    Args:
      variables: {"params", "batch_stats"} of the backbone.
      arrays: published name -> values (`names.translated`).
      ignored: regular expression of the arrays that the backbone does not use.
    """
    new = {collection: _copy(tree) for collection, tree in variables.items()}
    loaded, missing, mismatched, invalid = [], [], [], []
    for collection, path, value in leaves(variables):
        name = published(path)
        if name not in arrays:
            missing.append(name)
            continue
        array = from_published(_squeezed(arrays[name], path, value.ndim), path)
        if array.shape != value.shape:
            mismatched.append(f"{name}: {arrays[name].shape} -> {_published_shape(value, path)}")
            continue
        loaded.append(name)
        if reason := _invalid(array, path[-1]):
            invalid.append(f"{name}: {reason}")
        with np.errstate(over="ignore"):  # reported above
            array = np.ascontiguousarray(np.real(array), dtype=np.float32)
        _put(new[collection], path, array)
        if path[-1].startswith("clean_"):
            _put(new[collection], (*path[:-1], path[-1].replace("clean_", "adversarial_")), array)
    known = {*loaded, *missing, *(each.split(":")[0] for each in mismatched)}
    rest = [name for name in arrays if name not in known and not IGNORED.fullmatch(name)]
    unused = [name for name in rest if re.fullmatch(ignored, name)]
    return new, LoadReport(
        tuple(loaded),
        tuple(missing),
        tuple(name for name in rest if name not in unused),
        tuple(mismatched),
        tuple(unused),
        tuple(invalid),
    )


def _invalid(array: np.ndarray, leaf: str) -> str:
    """Returns why the values of a parameter are invalid, or "" if they are valid."""
    if array.dtype.kind in "iubc":  # types of ml_dtypes are of kind V
        return f"has type {array.dtype}, not a floating-point type"
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        return "is not finite"
    return "is below 0" if leaf == "clean_var" and (values < 0).any() else ""


def export(variables: Mapping[str, PyTree]) -> Arrays:
    """Returns published name -> array in PyTorch's axis order: the inverse of `load_weights`."""
    return {
        published(path): np.ascontiguousarray(to_published(np.asarray(value), path))
        for _, path, value in leaves(variables)
    }


def _squeezed(array: np.ndarray, path: Path, rank: int) -> np.ndarray:
    """Flattens a dense kernel stored as a convolution over the whole map (timm's VGG)."""
    if path[-1] == "kernel" and rank == 2 and array.ndim == 4:
        return array.reshape(len(array), -1)
    return array


def _published_shape(value: Any, path: Path) -> tuple[int, ...]:
    return to_published(np.broadcast_to(np.float32(0), value.shape), path).shape


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _put(tree: Any, path: Path, value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree[name]
    tree[path[-1]] = value
