"""Search with a trained run: a picture in, the most similar pictures of its gallery out."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, PyTree
from PIL import Image

from afa import config as configuration
from afa.checkpoint import Checkpoints
from afa.config import ExperimentConfig
from afa.data import sets
from afa.data.images import UnreadablePicture, decode
from afa.data.pipeline import preprocessing
from afa.data.types import ImageSet, Picture
from afa.errors import UserError
from afa.evaluation.embed import Embedding
from afa.models import embedder
from afa.report.pictures import results_sheet
from afa.report.writers import write_atomically
from afa.retrieval.calibration import Calibration
from afa.retrieval.index import Index
from afa.train import optim, state
from afa.train.state import TrainState, checkpoint_id
from afa.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Hit:
    id: str
    class_name: str
    path: str
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of one query, best first.

    Attributes:
      sheet: the saved picture of the results; None when there is none, and `without_sheet` why.
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
    """A run's index, and the networks that describe a query as the gallery was described."""

    def __init__(
        self, home: Workdir, config: ExperimentConfig, index: Index, variables: PyTree
    ) -> None:
        self.home, self.config, self.index, self.variables = home, config, index, variables
        manifest = index.embeddings.manifest
        players = embedder.build(config, manifest["training_classes"])
        one = dataclasses.replace(config.evaluation, batch_size=1)
        self._embed = Embedding(players, dataclasses.replace(config, evaluation=one)).fused(
            manifest["weights"]
        )
        self._embed_many = Embedding(players, config).fused(manifest["weights"])

    @classmethod
    def load(cls, directory: Path) -> "Searcher":
        """Opens a finished run.

        Raises:
          UserError: no run, one that is not finished, or an index that another checkpoint or
            preprocessing made.
        """
        home = Workdir(directory)
        if home.stored() is None:
            raise UserError(f"--run={directory}: holds no run (config.json is missing)")
        if not home.result.is_file():
            raise UserError(f"--run={directory}: the run is not finished; start it again to go on")
        index = Index.load(home.embeddings / "index")
        manifest = index.embeddings.manifest
        config = configuration.from_dict(manifest["configuration"])
        trained = restore(home, config, manifest["training_classes"], manifest["step"])
        expected = preprocessing(config.data) | embedder.preprocessing_record(config)
        index.require(checkpoint=checkpoint_id(trained), preprocessing=expected)
        return cls(home, config, index, trained.search_variables())

    def describe(self, images: ImageSet) -> Float32[np.ndarray, "n d"]:
        """Unit vectors of many pictures, as those of the gallery."""
        return self._embed_many(self.variables, images)

    def search(
        self,
        pictures: Sequence[Path],
        k: int | None = None,
        sheets: Path | None = None,
        false_matches: float | None = None,
    ) -> Iterator[Answer]:
        """Answers one query after the other.

        Args:
          pictures: files.
          k: results a query; None is the run's `retrieval.results`.
          sheets: folder for the pictures of the results; None is `searches` in the run.
          false_matches: share of unknown objects that may be taken for one of the gallery; None
            does not ask whether the gallery holds the object.

        Raises:
          UserError: a file that is missing or no picture, a k larger than the gallery, or a share
            that cannot be told.
        """
        threshold = None
        if false_matches is not None:
            stored = self.index.embeddings.manifest.get("unknown")
            threshold = Calibration.load(stored).threshold(false_matches)
        k = self.config.retrieval.results if k is None else k
        contents = [_read(path) for path in pictures]  # all are checked before the first answer
        sheets = sheets or self.home.root / "searches"
        for number, (path, content) in enumerate(zip(pictures, contents, strict=True)):
            one = ImageSet([content], np.zeros(1, np.int64), (str(path),), np.zeros(1, bool))
            rows, scores = self.index.rows(self._embed(self.variables, one), k)
            found = [(int(r), float(s)) for r, s in zip(rows[0], scores[0], strict=True) if r >= 0]
            export = self.index.embeddings
            hits = tuple(
                Hit(export.ids[r], export.classes[r], export.paths[r], score) for r, score in found
            )
            namesake = any(path.stem == other.stem for other in pictures[:number])
            sheet = sheets / f"{path.stem}{f'-{number + 1}' if namesake else ''}-results.png"
            reason = self._draw(sheet, content, hits)
            yield Answer(str(path), hits, None if reason else sheet, reason, threshold)

    def _draw(self, path: Path, query: bytes, hits: Sequence[Hit]) -> str:
        """Saves the picture of the results; returns "", or why there is none."""
        try:
            found = [
                (decode(self._picture(hit)), f"{hit.class_name}\n{hit.id}", hit.score, None)
                for hit in hits
            ]
            sheet = results_sheet(decode(query), found)
            write_atomically(path, lambda file: Image.fromarray(sheet).save(file, "PNG"))
        except (UserError, UnreadablePicture) as error:
            return str(error)
        except OSError as error:
            return f"{error.filename or path}: {error.strerror}"
        return ""

    def _picture(self, hit: Hit) -> Picture:
        """A picture of the gallery: its own file where it has one, else from the data set.

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
        return sets.load(self.config.data).everything()

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._images.ids)}


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        decode(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnreadablePicture as error:
        raise UserError(f"{path}: is no readable picture ({error})") from None
    return content


def restore(home: Workdir, config: ExperimentConfig, classes: int, step: int) -> TrainState:
    """The state of a run at a step.

    Raises:
      UserError: the run has no such checkpoint, or its configuration differs.
    """
    players = embedder.build(config, classes)
    optimisers = optim.optimisers(config, 1, 1, 1)  # only the shape of their state matters here
    shapes = jax.eval_shape(
        lambda: state.create(players, optimisers, config.seed, config.data.image_size)
    )
    with Checkpoints(home.checkpoints, config.train.keep_best) as checkpoints:
        if step not in checkpoints.steps():
            raise UserError(f"{home.checkpoints} has no checkpoint of step {step}")
        return checkpoints.restore(shapes, config, step)[0]
