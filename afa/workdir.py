"""The directory of a run: what lies where, and the lock that keeps a second process out."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa import config as configuration
from afa.config import ExperimentConfig
from afa.errors import UserError
from afa.io import locked, write_json

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PER_QUERY_FILE = "per_query.parquet"


@dataclass(frozen=True)
class Workdir:
    """Names of everything in a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def split(self) -> Path:
        return self.root / "split.json"

    @property
    def weights(self) -> Path:
        return self.root / "weights.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def per_query(self) -> Path:
        return self.root / PER_QUERY_FILE

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def create(self) -> None:
        """Makes the directory.

        Raises:
          UserError: it cannot be made or written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={self.root}: cannot be made ({error.strerror})") from None
        if not os.access(self.root, os.W_OK):
            raise UserError(f"--workdir={self.root}: is not writable")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory; the system lets go of it when the process dies.

        Raises:
          UserError: another process holds it, it cannot be made or written, or its disk fills up.
        """
        self.create()
        busy = (
            f"--workdir={self.root}: another run is working there (choose another directory, or "
            "wait until it ends)"
        )
        with locked(self.root / ".lock", busy=busy):
            try:
                yield
            except OSError as error:
                if error.errno not in DISK_ERRORS:
                    raise
                raise UserError(
                    f"--workdir={self.root}: cannot be written ({error.strerror}); the same "
                    "command goes on once it can"
                ) from error

    def stored(self) -> tuple[str, ExperimentConfig] | None:
        """Experiment name and configuration of the run that lives here, if any.

        Raises:
          UserError: the file is not readable as a configuration.
        """
        if not self.config.is_file():
            return None
        try:
            content = json.loads(self.config.read_text("utf-8"))
            return content["experiment"], configuration.from_dict(content["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config}: is no stored configuration ({error})") from None

    def claim(self, experiment: str, config: ExperimentConfig) -> None:
        """Makes this directory the home of a run, or confirms that it is.

        Raises:
          UserError: it holds a run of another configuration; the differing fields are listed.
        """
        if stored := self.stored():
            if changed := configuration.differences(stored[1], config):
                raise UserError(
                    f"--workdir={self.root} holds a run of another configuration: "
                    + "; ".join(changed)
                    + " (choose another --workdir, or the stored values)"
                )
            return
        write_json(self.config, {"experiment": experiment, "config": configuration.to_dict(config)})

    def confirm(self, fingerprint: str) -> None:
        """Refuses to go on with other images than the run began with (`split.json`).

        Raises:
          UserError: the data set changed since.
        """
        try:
            stored = json.loads(self.split.read_text("utf-8"))["fingerprint"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.split}: is no stored split ({error})") from None
        if stored != fingerprint:
            raise UserError(
                f"--workdir={self.root} holds a run on other images: fingerprint "
                f"{stored[:12]} -> {fingerprint[:12]} (choose another --workdir, or bring back "
                "the data set as it was)"
            )

    def confirm_weights(self, record: Mapping[str, Any] | None) -> None:
        """Notes the weights that a run begins with, or refuses to go on with others.

        Args:
          record: of the weights (`Pretrained.record`); None when the run begins with random ones.

        Raises:
          UserError: the file changed since.
        """
        if record is None:
            return
        if not self.weights.is_file():
            write_json(self.weights, dict(record))
            return
        try:
            stored = json.loads(self.weights.read_text("utf-8"))["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.weights}: is no record of weights ({error})") from None
        if stored != record["sha256"]:
            raise UserError(
                f"--workdir={self.root} began with other weights: sha256 {stored[:12]} -> "
                f"{record['sha256'][:12]} (choose another --workdir, or bring back the file)"
            )
