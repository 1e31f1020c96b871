"""Searches a gallery with query images: the most similar gallery images of each query."""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from afa.data.images import UnreadableImage, decode
from afa.data.sources import registry
from afa.data.types import ImageSet, RawImage
from afa.errors import UserError, printable
from afa.inference.load import TrainedEmbedder
from afa.io import write_atomically
from afa.report.images import results_sheet
from afa.retrieval import index as indexes
from afa.retrieval.calibration import Calibration
from afa.retrieval.index import Index
from afa.retrieval.records import Id
from afa.retrieval.rerank import serving


@dataclasses.dataclass(frozen=True)
class Hit:
    """One result: a gallery image and its score."""

    id: Id
    class_name: str
    path: str
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of one query.

    Attributes:
      query: path of the query image.
      hits: results, best first.
      sheet: path of the image that shows the results; None if it could not be written.
      without_sheet: why `sheet` is None; "" otherwise.
      threshold: similarity below which the object counts as unknown; None without calibration.
    """

    query: str
    hits: tuple[Hit, ...]
    sheet: Path | None
    without_sheet: str = ""
    threshold: float | None = None

    @property
    def match(self) -> bool | None:
        """Whether the gallery holds the object; None without a threshold."""
        if self.threshold is None:
            return None
        return bool(self.hits) and self.hits[0].score >= self.threshold

    def to_json(self) -> dict[str, Any]:
        """Returns the answer as JSON values."""
        values = dataclasses.asdict(self) | {"match": self.match}
        return values | {"sheet": str(self.sheet) if self.sheet else None}


class Searcher:
    """A gallery index with the networks that embed its queries.

    Args:
      embedder: networks of the run that embedded the gallery.
      index: the gallery.
      directory: of the run or the index; result images are written to `searches` in it.

    Raises:
      UserError: the index was made by other networks.
    """

    def __init__(self, embedder: TrainedEmbedder, index: Index, directory: Path) -> None:
        self.embedder, self.index, self.directory = embedder, index, directory
        self.config = embedder.config
        record = embedder.record
        index.require(checkpoint=record["checkpoint"], preprocessing=record["preprocessing"])

    @classmethod
    def load(cls, run: Path | None = None, directory: Path | None = None) -> "Searcher":
        """Opens the gallery of a finished run, or an index of other images.

        Args:
          run: the run; None for the run that the index names.
          directory: the index; None for the index of the run.

        Raises:
          UserError: both are None, no run or index, or an index made by other networks.
        """
        if directory is None:
            if run is None:
                raise UserError("--run=DIR or --index=DIR is missing")
            embedder = TrainedEmbedder.load(run)
            return cls(embedder, indexes.load(embedder.workdir.embeddings), run)
        index = indexes.load(directory)
        if run is None:
            if "run" not in index.manifest:
                raise UserError(f"--index={directory}: names no run; give --run=DIR too")
            return cls(TrainedEmbedder.load(directory / index.manifest["run"]), index, directory)
        return cls(TrainedEmbedder.load(run), index, directory)

    def search(
        self,
        images: Sequence[Path],
        k: int | None = None,
        sheets: Path | None = None,
        false_matches: float | None = None,
        rerank: str | None = None,
    ) -> Iterator[Answer]:
        """Searches the queries one after the other.

        Args:
          images: query image files.
          k: results per query; None for the run's `retrieval.results`, or the size of the gallery
            if it is smaller.
          sheets: folder for the images that show the results; None for `searches` in the run or
            index.
          false_matches: false match rate of the "no match" threshold; None for no threshold.
          rerank: name of a re-ranking method; scores are then those of the method.

        Raises:
          UserError: a file that is missing or not an image, a k larger than the gallery, a rate
            that cannot be measured, a method that cannot be used, or both `false_matches` and
            `rerank`, because a threshold is a cosine similarity.
        """
        threshold, rank = None, self.index.search
        if rerank is not None:
            if false_matches is not None:
                raise UserError("--rerank and --false_matches exclude each other")
            rank = serving.ranker(self.embedder.workdir.root, self.index, rerank)
        if false_matches is not None:
            stored = self.index.manifest.get("unknown")
            threshold = Calibration.load(stored).threshold(false_matches)
        k = min(self.config.retrieval.results, len(self.index)) if k is None else k
        for path in images:  # check all queries before the first answer
            _read(path)
        sheets = sheets or self.directory / "searches"
        used_names: set[str] = set()
        for path in images:
            content = _read(path)
            ids, scores = next(iter(rank(self.embedder.one(content), k)))
            hits = tuple(
                Hit(entry.id, entry.class_name, entry.path, float(score))
                for entry, score in zip(self.index.lookup(ids), scores, strict=True)
            )
            sheet = sheets / f"{_unused_name(path.stem, used_names)}-results.png"
            reason = self._draw(sheet, content, hits)
            yield Answer(str(path), hits, None if reason else sheet, reason, threshold)

    def _draw(self, path: Path, query: bytes, hits: Sequence[Hit]) -> str:
        """Writes the image that shows the results; returns "" or the reason of a failure."""
        try:
            found = [(decode(self._image(hit)), _caption(hit), hit.score, None) for hit in hits]
            sheet = results_sheet(decode(query), found)
            write_atomically(path, lambda file: Image.fromarray(sheet).save(file, "PNG"))
        except (UserError, UnreadableImage) as error:
            return str(error)
        except OSError as error:
            return f"{error.filename or path}: {error.strerror}"
        return ""

    def _image(self, hit: Hit) -> RawImage:
        """Reads a gallery image from its file, or from the data set if it has no file of its own.

        Raises:
          OSError, UserError: it can no longer be read.
        """
        if hit.path != hit.id:
            return Path(hit.path).read_bytes()
        if hit.id not in self._row_of:
            raise UserError(f"{hit.id} is no longer in the data set")
        return self._images.images[self._row_of[hit.id]]

    @functools.cached_property
    def _images(self) -> ImageSet:
        return registry.load(self.config.data).everything()

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._images.ids)}


def _unused_name(stem: str, used: set[str]) -> str:
    """Returns the stem, with a number if another query has it; adds it to `used`.

    Names are compared without case and Unicode form, because some file systems ignore both.
    """
    name, number = stem, 1
    while (key := unicodedata.normalize("NFKC", name).casefold()) in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(key)
    return name


def _caption(hit: Hit) -> str:
    return f"{printable(hit.class_name)}\n{printable(str(hit.id))}"


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        decode(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnreadableImage as error:
        raise UserError(f"{path}: is not a readable image ({error})") from None
    return content
