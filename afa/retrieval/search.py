"""Search with a trained run: an image in, the most similar images of its gallery out."""

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
from afa.inference.load import Trained
from afa.io import write_atomically
from afa.report.images import results_sheet
from afa.retrieval import index as indexes
from afa.retrieval.calibration import Calibration
from afa.retrieval.index import Index
from afa.retrieval.records import Id
from afa.retrieval.rerank import serving


@dataclasses.dataclass(frozen=True)
class Hit:
    id: Id
    class_name: str
    path: str
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of one query, best first.

    Attributes:
      sheet: the saved image of the results; None when there is none, and `without_sheet` why.
      threshold: score below which the object is unknown; None when that was not asked.
    """

    query: str
    hits: tuple[Hit, ...]
    sheet: Path | None
    without_sheet: str = ""
    threshold: float | None = None

    @property
    def match(self) -> bool | None:
        """Whether the gallery holds the object; None when that was not asked."""
        if self.threshold is None:
            return None
        return bool(self.hits) and self.hits[0].score >= self.threshold

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self) | {"match": self.match}
        return values | {"sheet": str(self.sheet) if self.sheet else None}


class Searcher:
    """A gallery, and the networks that describe a query as it was described."""

    def __init__(self, trained: Trained, index: Index, home: Path) -> None:
        self.trained, self.index, self.home = trained, index, home
        self.config = trained.config
        record = trained.record
        index.require(checkpoint=record["checkpoint"], preprocessing=record["preprocessing"])

    @classmethod
    def load(cls, run: Path | None = None, directory: Path | None = None) -> "Searcher":
        """Opens the gallery of a finished run, or an index of other images.

        Args:
          run: the run; None is the one that the index names.
          directory: the index; None is that of the run.

        Raises:
          UserError: neither, no run or index, or networks that did not make the index.
        """
        if directory is None:
            if run is None:
                raise UserError("--run=DIR or --index=DIR is missing")
            trained = Trained.load(run)
            return cls(trained, indexes.load(trained.home.embeddings), run)
        index = indexes.load(directory)
        if run is None:
            if "run" not in index.manifest:
                raise UserError(f"--index={directory}: names no run; give --run=DIR too")
            return cls(Trained.load(directory / index.manifest["run"]), index, directory)
        return cls(Trained.load(run), index, directory)

    def search(
        self,
        images: Sequence[Path],
        k: int | None = None,
        sheets: Path | None = None,
        false_matches: float | None = None,
        rerank: str | None = None,
    ) -> Iterator[Answer]:
        """Answers one query after the other.

        Args:
          images: files.
          k: results a query; None is the run's `retrieval.results`, or the whole gallery where it
            is smaller.
          sheets: folder for the images of the results; None is `searches` in the run, or beside
            the index.
          false_matches: share of unknown objects that may be taken for one of the gallery; None
            does not ask whether the gallery holds the object.
          rerank: method that ranks the whole gallery anew; scores are then its own.

        Raises:
          UserError: a file that is missing or no image, a k larger than the gallery, a share that
            cannot be told, a method that cannot be used, or both of the last two: a threshold is a
            similarity.
        """
        threshold, rank = None, self.index.search
        if rerank is not None:
            if false_matches is not None:
                raise UserError("--rerank and --false_matches exclude each other")
            rank = serving.ranker(self.trained.home.root, self.index, rerank)
        if false_matches is not None:
            stored = self.index.manifest.get("unknown")
            threshold = Calibration.load(stored).threshold(false_matches)
        k = min(self.config.retrieval.results, len(self.index)) if k is None else k
        for path in images:  # all are checked before the first answer
            _read(path)
        sheets = sheets or self.home / "searches"
        named: set[str] = set()
        for path in images:
            content = _read(path)
            ids, scores = next(iter(rank(self.trained.one(content), k)))
            hits = tuple(
                Hit(entry.id, entry.class_name, entry.path, float(score))
                for entry, score in zip(self.index.lookup(ids), scores, strict=True)
            )
            sheet = sheets / f"{_fresh(path.stem, named)}-results.png"
            reason = self._draw(sheet, content, hits)
            yield Answer(str(path), hits, None if reason else sheet, reason, threshold)

    def _draw(self, path: Path, query: bytes, hits: Sequence[Hit]) -> str:
        """Saves the image of the results; returns "", or why there is none."""
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
        """An image of the gallery: its own file where it has one, else from the data set.

        Raises:
          OSError, UserError: it cannot be read any more.
        """
        if hit.path != hit.id:
            return Path(hit.path).read_bytes()
        if hit.id not in self._places:
            raise UserError(f"{hit.id} is no longer in the data set")
        return self._images.images[self._places[hit.id]]

    @functools.cached_property
    def _images(self) -> ImageSet:
        return registry.load(self.config.data).everything()

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._images.ids)}


def _fresh(stem: str, named: set[str]) -> str:
    """The stem, or with the first number that makes it one that no other query has, however the
    file system compares names."""
    name, number = stem, 1
    while (key := unicodedata.normalize("NFKC", name).casefold()) in named:
        number += 1
        name = f"{stem}-{number}"
    named.add(key)
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
        raise UserError(f"{path}: is no readable image ({error})") from None
    return content
