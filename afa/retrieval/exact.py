"""Exact search on the devices; all reported metrics use it.

The gallery is processed in tiles. The similarities of a tile are one float32 matrix product. They
are reduced to the best k so far, or to the number of rows ranked before each positive. The full
similarity matrix is never in memory, so a gallery of a million rows fits beside the model.

Similarity is the cosine: the dot product of unit vectors. Ties are broken by gallery row. Shapes
are rounded up to a few sizes, so that calls of similar size share one compilation.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32, Int64, PyTree

from afa import parallel
from afa.errors import UserError

PADDING = -1
QUERY_ROWS = 1024  # queries per device and tile
CPU_TILE_ROWS = 2048  # 1024 x 2048 similarities fit into a CPU's cache
ACCELERATOR_TILE_ROWS = 16384  # accelerators are faster with fewer, larger kernels
TILE_STEP = 128  # a multiple of the vector width, so that equal rows get equal bits
ACCELERATOR_SLAB_SHARE = 0.25  # part of its memory that holds the gallery, or a slab of it
ACCELERATOR_SLAB_BYTES = 2**30  # where its memory is not known
CPU_SLAB_BYTES = 2**33  # large: copying the gallery for every search costs a sixth of the search
GROUP = 32  # neighbouring similarities that are first reduced to their maximum
COUNTED = 64  # up to this many positives per query, counting is faster than sorting on a CPU
SORTED_ENTRIES = 2**23  # similarities sorted at a time: 32 MiB, and three times that for ranks
NORM_TOLERANCE = 1e-3
CHECKED_ROWS = 65536


class Gallery:
    """Gallery vectors, checked once and kept on the devices if they fit into one slab.

    Every search function also takes plain arrays; a `Gallery` saves the check and the transfer
    when it is searched several times.

    Args:
      vectors: unit vectors.

    Raises:
      UserError: no rows, a row that is not finite, or one that is not a unit vector.
    """

    def __init__(self, vectors: Float32[np.ndarray, "n d"]) -> None:
        if not len(vectors):
            raise UserError("the gallery is empty")
        check_unit("gallery", vectors)
        self.vectors = vectors
        self.rows, self.dimension = vectors.shape
        largest = ACCELERATOR_TILE_ROWS if parallel.accelerated() else CPU_TILE_ROWS
        self._tile = min(largest, -(-self.rows // TILE_STEP) * TILE_STEP)
        tiles = -(-self.rows // self._tile)
        fitting = max(1, _slab_bytes() // (self._tile * max(1, self.dimension) * 4))
        slabs = -(-tiles // fitting)
        self._slab_tiles = -(-tiles // slabs)
        self._resident = self._slab(0) if slabs == 1 else None

    def slabs(self) -> Iterator[tuple[Float32[Array, "tiles rows d"], Int32[np.ndarray, ""]]]:
        """Yields every part of the gallery, on the devices, with its first row."""
        for begin in range(0, self.rows, self._slab_tiles * self._tile):
            slab = self._slab(begin) if self._resident is None else self._resident
            yield slab, np.array(begin, np.int32)

    def slab_mask(self, marks: Bool[np.ndarray, "n"], begin: int) -> Bool[Array, "tiles rows"]:
        """Puts the marks of the slab that begins at row `begin` on the devices."""
        return self._padded(marks, begin)

    def _slab(self, begin: int) -> Float32[Array, "tiles rows d"]:
        return self._padded(self.vectors, begin)

    def _padded(self, values: np.ndarray, begin: int) -> Array:
        count = self._slab_tiles * self._tile
        part = values[begin : begin + count]
        if len(part) < count:
            padded = np.zeros((count, *values.shape[1:]), values.dtype)
            padded[: len(part)] = part
            part = padded
        return parallel.replicate_local(
            part.reshape(self._slab_tiles, self._tile, *values.shape[1:])
        )


def topk(
    queries: Float32[np.ndarray, "q d"],
    gallery: Gallery | Float32[np.ndarray, "n e"],
    k: int,
    exclude: Int[np.ndarray, "q"] | None = None,
    allowed: Bool[np.ndarray, "n"] | None = None,
    recall: float = 1.0,
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """Finds the k most similar gallery rows of each query, best first.

    Args:
      queries: unit vectors.
      gallery: unit vectors.
      k: results per query.
      exclude: gallery row that is the query itself, -1 for none; it is left out of the results.
      allowed: mask of gallery rows that may be returned; None for all.
      recall: below 1, accelerators use `lax.approx_max_k` on each tile (Chern et al. 2022,
        "TPU-KNN") with this expected recall; a CPU is always exact.

    Returns:
      Similarities and gallery rows; -inf and -1 where fewer than k rows are allowed.

    Raises:
      UserError: vectors that are not finite or not of unit length, different dimensions, an
        `exclude` outside the gallery, or a k below 1 or above the number of gallery rows.
    """
    gallery, exclude = _checked(queries, gallery, exclude)
    available = gallery.rows - bool(np.any(exclude != PADDING))
    if not 1 <= k <= available:
        raise UserError(f"k={k} is not between 1 and {available}, the gallery rows to choose from")
    scores = np.full((len(queries), k), -np.inf, np.float32)
    index = np.full((len(queries), k), PADDING, np.int32)
    merge = _topk(recall if parallel.accelerated() else 1.0)
    for slab, begin in gallery.slabs():
        marked = None if allowed is None else gallery.slab_mask(allowed, int(begin))
        shared = slab, begin, np.array(gallery.rows, np.int32), marked
        for block, size in _blocks(len(queries)):
            rows = queries[block], exclude[block], scores[block], index[block]
            found = merge(shared, _padded_to(rows, size))
            scores[block], index[block] = (part[: len(rows[0])] for part in found)
    return scores, np.where(scores == -np.inf, PADDING, index).astype(np.int64)


def positive_ranks(
    queries: Float32[np.ndarray, "q d"],
    gallery: Gallery | Float32[np.ndarray, "n e"],
    query_labels: Int[np.ndarray, "q"],
    gallery_labels: Int[np.ndarray, "n"],
    exclude: Int[np.ndarray, "q"] | None = None,
) -> Int32[np.ndarray, "q r"]:
    """Computes the ranks of all positives of each query in the complete ranking.

    The rank of a positive is the number of gallery rows that are more similar, or equally similar
    with a lower row; the query itself is not counted. The rows before a positive are counted; on a
    CPU, queries with more than `COUNTED` positives sort their ranking instead. All similarities
    come from the same compiled product, so ties are exact.

    Args:
      queries: unit vectors.
      gallery: unit vectors.
      query_labels: class of each query.
      gallery_labels: class of each gallery row.
      exclude: gallery row that is the query itself, -1 for none.

    Returns:
      0-based ranks, ascending, padded with -1; only -1 for a query without positives.

    Raises:
      UserError: vectors that are not finite or not of unit length, different dimensions, or an
        `exclude` outside the gallery.
    """
    gallery, exclude = _checked(queries, gallery, exclude)
    members = _Members(gallery_labels)
    counts = members.count(query_labels)
    ranks = np.full((len(queries), int(counts.max(initial=0))), PADDING, np.int32)
    order = np.argsort(counts, kind="stable")  # queries of one block have similar counts
    blocks = [(order[block], size) for block, size in _blocks(len(queries))]
    blocks = [(rows, size) for rows, size in blocks if counts[rows[-1]]]
    tables = [
        members.rows(query_labels[rows], _bucket(int(counts[rows[-1]]))) for rows, _ in blocks
    ]
    parts = [(queries[r], exclude[r], table) for (r, _), table in zip(blocks, tables, strict=True)]
    # Counts ascend from block to block, so the blocks to sort are the last ones.
    most = gallery.rows if parallel.accelerated() else COUNTED
    few = sum(int(counts[rows[-1]]) <= most for rows, _ in blocks)
    before = _counted(gallery, parts[:few], [size for _, size in blocks[:few]])
    before += [_sorted(gallery, *part) for part in parts[few:]]
    for (rows, _), table, count in zip(blocks, tables, before, strict=True):
        absent = (table == PADDING) | (table == exclude[rows, None])
        last = np.iinfo(np.int32).max
        ascending = np.sort(np.where(absent, last, count), axis=1)[:, : ranks.shape[1]]
        ranks[rows, : ascending.shape[1]] = np.where(ascending == last, PADDING, ascending)
    return ranks[:, : int((ranks != PADDING).sum(axis=1).max(initial=0))]


def _counted(
    gallery: Gallery,
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    sizes: Sequence[int],
) -> list[Int32[np.ndarray, "_ _"]]:
    """Counts the rows before each positive, for blocks of (queries, exclude, positives)."""
    scores = [np.full(table.shape, -np.inf, np.float32) for _, _, table in parts]
    before = [np.zeros(table.shape, np.int32) for _, _, table in parts]
    for counting in (False, True):
        for slab, begin in gallery.slabs():
            shared = slab, begin, np.array(gallery.rows, np.int32), np.array(counting)
            for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                found = _count()(shared, _padded_to((*part, scores[i], before[i]), size))
                scores[i], before[i] = (each[: len(part[0])] for each in found)
    return before


def _sorted(
    gallery: Gallery,
    queries: Float32[np.ndarray, "q d"],
    exclude: Int32[np.ndarray, "q"],
    positives: Int32[np.ndarray, "q w"],
) -> Int32[np.ndarray, "q w"]:
    """As `_counted` for one block, by sorting the rankings of a few queries at a time."""
    before = np.zeros(positives.shape, np.int32)
    devices = parallel.local_device_count()
    size = _bucket(min(len(queries), SORTED_ENTRIES // gallery.rows) // devices) * devices
    for block in parallel.local_blocks(len(queries), size):
        rows = _padded_to((queries[block], exclude[block]), size)
        slabs = [
            np.asarray(_table()((slab, begin, np.array(gallery.rows, np.int32)), rows))
            for slab, begin in gallery.slabs()
        ]
        scores = np.concatenate(slabs, axis=1)[: len(queries[block]), : gallery.rows]
        order = np.argsort(-scores, axis=1, kind="stable")
        rank = np.empty(order.shape, np.int32)
        np.put_along_axis(rank, order, np.arange(gallery.rows, dtype=np.int32)[None], axis=1)
        before[block] = np.take_along_axis(rank, positives[block], axis=1)
    return before


def normalise(vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Scales vectors to unit length.

    Raises:
      UserError: a row that is all zero, NaN or infinite.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    bad = ~(np.isfinite(norms) & (norms > 0))
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{bad.sum()} of {len(bad)} vectors have no direction (first: row {row})")
    return (vectors / norms[:, None]).astype(np.float32)


def check_unit(name: str, vectors: Float32[np.ndarray, "n d"]) -> None:
    """Checks that all rows are unit vectors.

    Raises:
      UserError: names the array, the first bad row and its length (NaN or infinite if an entry is).
    """
    for part in parallel.local_blocks(len(vectors), CHECKED_ROWS):
        norms = np.sqrt(np.einsum("nd,nd->n", vectors[part], vectors[part]))
        bad = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # written so that NaN is bad
        if bad.any():
            row = int(bad.argmax())
            kind = "unit vectors" if np.isfinite(norms[row]) else "finite"
            raise UserError(
                f"{name}: rows must be {kind}, but row {part.start + row} has length {norms[row]:g}"
            )


# ---- device functions --------------------------------------------------------------------------


@functools.cache
def _topk(recall: float) -> Callable[[PyTree, PyTree], PyTree]:
    """Merges one slab into the best k so far, for this device's queries."""

    def step(shared: PyTree, rows: PyTree) -> PyTree:
        slab, begin, total, allowed = shared
        query, exclude, scores, index = rows
        k = scores.shape[1]

        def merge(best: PyTree, tile: PyTree) -> tuple[PyTree, None]:
            part, start, marked = tile
            similarity, column = _similarity(query, exclude, total, part, start)
            if marked is not None:
                similarity = jnp.where(marked, similarity, -jnp.inf)
            similarity, column = _tile_candidates(similarity, column, k, recall)
            # Lower rows come first, and top_k prefers the first of equals.
            candidates = jnp.concatenate([best[0], similarity], axis=1)
            rows = jnp.concatenate([best[1], column], axis=1)
            kept, where = lax.top_k(candidates, k)
            return (kept, jnp.take_along_axis(rows, where, axis=1)), None

        return lax.scan(merge, (scores, index), (slab, _starts(slab, begin), allowed))[0]

    return parallel.map_rows(step)


def _tile_candidates(
    similarity: Float32[Array, "b t"], column: Int32[Array, "t"], k: int, recall: float
) -> tuple[Float32[Array, "b c"], Int32[Array, "b c"]]:
    """Reduces a tile to few similarities that contain the k best, in the order of their rows.

    The k best are in the k groups with the largest maxima: for any other group, k groups each
    contain a larger similarity, or an equal one in a lower row.
    """
    all_rows = jnp.broadcast_to(column, similarity.shape)
    if recall < 1 and k < similarity.shape[1]:
        similarity, where = lax.approx_max_k(similarity, k, recall_target=recall)
        return similarity, jnp.take_along_axis(all_rows, where, axis=1)
    groups = similarity.shape[1] // GROUP
    if 2 * k > groups:
        return similarity, all_rows
    grouped = similarity.reshape(len(similarity), groups, GROUP)
    chosen = jnp.sort(lax.top_k(grouped.max(axis=2), k)[1], axis=1)
    kept = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1)
    first = column[0] + GROUP * chosen
    rows = first[:, :, None] + jnp.arange(GROUP, dtype=jnp.int32)
    return kept.reshape(len(kept), -1), rows.reshape(len(kept), -1)


@functools.cache
def _count() -> Callable[[PyTree, PyTree], PyTree]:
    """Looks up the similarity of each positive in one slab, or counts the rows before it.

    Both passes use one compiled product, because two products could round differently.
    """

    def step(shared: PyTree, rows: PyTree) -> PyTree:
        slab, begin, total, counting = shared
        query, exclude, positives, scores, before = rows

        def visit(state: PyTree, tile: PyTree) -> tuple[PyTree, None]:
            similarity, column = _similarity(query, exclude, total, *tile)

            def look_up(state: PyTree) -> PyTree:
                scores, before = state
                offset = positives - column[0]
                inside = (offset >= 0) & (offset < len(column))
                here = jnp.take_along_axis(similarity, jnp.where(inside, offset, 0), axis=1)
                return jnp.where(inside, here, scores), before

            def count(state: PyTree) -> PyTree:
                scores, before = state

                def better(positive: tuple[Array, Array]) -> Array:
                    score, row = (part[:, None] for part in positive)
                    ahead = (similarity > score) | ((similarity == score) & (column < row))
                    return ahead.sum(axis=1, dtype=jnp.int32)

                return scores, before + lax.map(better, (scores.T, positives.T)).T

            return lax.cond(counting, count, look_up, state), None

        return lax.scan(visit, (scores, before), (slab, _starts(slab, begin)))[0]

    return parallel.map_rows(step)


@functools.cache
def _table() -> Callable[[PyTree, PyTree], PyTree]:
    """Computes all similarities with one slab."""

    def step(shared: PyTree, rows: PyTree) -> PyTree:
        slab, begin, total = shared
        query, exclude = rows
        tiles = lax.map(
            lambda tile: _similarity(query, exclude, total, *tile)[0],
            (slab, _starts(slab, begin)),
        )
        return jnp.moveaxis(tiles, 0, 1).reshape(len(query), -1)

    return parallel.map_rows(step)


def _similarity(
    query: Float32[Array, "b d"],
    exclude: Int32[Array, "b"],
    total: Int32[Array, ""],
    tile: Float32[Array, "t d"],
    start: Int32[Array, ""],
) -> tuple[Float32[Array, "b t"], Int32[Array, "t"]]:
    """Similarities with a tile (-inf for the query itself and for padding), and its row numbers."""
    product = jnp.matmul(query, tile.T, precision=lax.Precision.HIGHEST)
    column = start + jnp.arange(len(tile), dtype=jnp.int32)
    hidden = (column >= total) | (column == exclude[:, None])
    return jnp.where(hidden, -jnp.inf, product), column


def _starts(slab: Float32[Array, "tiles t d"], begin: Int32[Array, ""]) -> Int32[Array, "tiles"]:
    return begin + jnp.arange(slab.shape[0], dtype=jnp.int32) * slab.shape[1]


# ---- host functions ----------------------------------------------------------------------------


def _slab_bytes() -> int:
    """Bytes of the gallery on each device at a time."""
    if not parallel.accelerated():
        return CPU_SLAB_BYTES
    memory = parallel.device_memory_bytes()
    return int(memory * ACCELERATOR_SLAB_SHARE) if memory else ACCELERATOR_SLAB_BYTES


class _Members:
    """The gallery rows of each class."""

    def __init__(self, labels: Int[np.ndarray, "n"]) -> None:
        self._order = np.argsort(labels, kind="stable").astype(np.int32)
        self._sorted = labels[self._order]

    def count(self, labels: Int[np.ndarray, "q"]) -> Int64[np.ndarray, "q"]:
        begin, end = (np.searchsorted(self._sorted, labels, side) for side in ("left", "right"))
        return end - begin

    def rows(self, labels: Int[np.ndarray, "q"], width: int) -> Int32[np.ndarray, "q w"]:
        """Rows of the class of each label, padded with -1 to `width`."""
        index = np.searchsorted(self._sorted, labels)[:, None] + np.arange(width)
        inside = index < len(self._sorted)
        index = np.where(inside, index, 0)
        own: Bool[np.ndarray, "q w"] = inside & (self._sorted[index] == labels[:, None])
        return np.where(own, self._order[index], np.int32(PADDING))


def _checked(
    queries: Float32[np.ndarray, "q d"],
    gallery: Gallery | Float32[np.ndarray, "n e"],
    exclude: Int[np.ndarray, "q"] | None,
) -> tuple[Gallery, Int32[np.ndarray, "q"]]:
    gallery = gallery if isinstance(gallery, Gallery) else Gallery(gallery)
    if queries.shape[1] != gallery.dimension:
        raise UserError(
            f"queries have {queries.shape[1]} dimensions, the gallery has {gallery.dimension}"
        )
    check_unit("queries", queries)
    if exclude is None:
        return gallery, np.full(len(queries), PADDING, np.int32)
    if np.any((exclude < PADDING) | (exclude >= gallery.rows)):
        raise UserError(f"exclude has a row outside the gallery of {gallery.rows} rows")
    return gallery, exclude.astype(np.int32)


def _bucket(count: int) -> int:
    """Rounds `count` up to a number of at most three significant bits, at least 8."""
    step = 1 << max(0, (max(count, 8) - 1).bit_length() - 3)
    return -(-max(count, 8) // step) * step


def _blocks(queries: int) -> Iterator[tuple[slice, int]]:
    """Nearly equal blocks of queries, and the number of rows that each is padded to."""
    devices = parallel.local_device_count()
    blocks = max(1, -(-queries // (QUERY_ROWS * devices)))
    size = _bucket(-(-queries // (blocks * devices))) * devices
    for block in parallel.local_blocks(queries, size):
        yield block, size


def _padded_to(rows: tuple[np.ndarray, ...], size: int) -> tuple[np.ndarray, ...]:
    """Pads with rows of zeros; their results are discarded."""
    missing = size - len(rows[0])
    return tuple(np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) for part in rows)
