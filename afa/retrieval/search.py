"""Search with a trained run: a picture in, the most similar pictures of its gallery out."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree, UInt8

from afa import config as configuration
from afa.checkpoint import Checkpoints
from afa.config import ExperimentConfig
from afa.data import sets
from afa.data.images import UnreadablePicture, decode
from afa.data.pipeline import preprocessing
from afa.data.types import ImageSet
from afa.errors import UserError
from afa.evaluation.embed import Embedding
from afa.models import embedder
from afa.report.pictures import results_sheet
from afa.report.writers import write_atomically
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
    """

    query: str
    hits: tuple[Hit, ...]
    sheet: Path | None
    without_sheet: str = ""

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
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
        index.require(checkpoint=checkpoint_id(trained), preprocessing=preprocessing(config.data))
        return cls(home, config, index, trained.search_variables())

    def search(
        self, pictures: Sequence[Path], k: int, sheets: Path | None = None
    ) -> Iterator[Answer]:
        """Answers one query after the other.

        Args:
          pictures: files.
          k: results a query.
          sheets: folder for the pictures of the results; None is `searches` in the run.

        Raises:
          UserError: a file that is missing or no picture, or a k larger than the gallery.
        """
        contents = [_read(path) for path in pictures]  # all are checked before the first answer
        shown, reason = self._gallery()
        for path, content in zip(pictures, contents, strict=True):
            one = ImageSet([content], np.zeros(1, np.int64), (str(path),), np.zeros(1, bool))
            rows, scores = self.index.rows(self._embed(self.variables, one), k)
            found = [(int(r), float(s)) for r, s in zip(rows[0], scores[0], strict=True) if r >= 0]
            export = self.index.embeddings
            hits = tuple(
                Hit(export.ids[r], export.classes[r], export.paths[r], score) for r, score in found
            )
            sheet = None
            if shown is not None:
                folder = sheets or self.home.root / "searches"
                sheet = folder / f"{path.stem}-results.png"
                self._draw(sheet, content, hits, shown)
            yield Answer(str(path), hits, sheet, reason)

    def _gallery(self) -> tuple[dict[str, bytes | UInt8[np.ndarray, "h w 3"]] | None, str]:
        """The gallery's pictures by id, where the data set can still be read; else why not."""
        try:
            images = sets.load(self.config.data).everything()
        except UserError as error:
            return None, str(error)
        return _ById(images), ""

    def _draw(self, path: Path, query: bytes, hits: Sequence[Hit], shown: Any) -> None:
        found = [
            (decode(shown[hit.id]), f"{hit.class_name}\n{hit.id}", hit.score, None) for hit in hits
        ]
        sheet = results_sheet(decode(query), found)
        from PIL import Image

        write_atomically(path, lambda file: Image.fromarray(sheet).save(file, "PNG"))


class _ById(dict[str, Any]):
    """Pictures looked up by id, read when asked for."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__({name: i for i, name in enumerate(images.ids)})
        self._images = images.images

    def __getitem__(self, name: str) -> Any:
        return self._images[super().__getitem__(name)]


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
