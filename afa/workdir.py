"""The directory of a run: paths of its files, and a lock against a second process."""

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
    """Paths of all files in a run directory."""

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

    @property
    def reads(self) -> Path:
        return self.root / "test_reads.json"

    def test_reads(self) -> int:
        """Returns how often the run was evaluated on its test classes."""
        return sum(self._reads().values()) or int(self.result.is_file())

    def count_test_read(self, command: str) -> None:
        """Counts an evaluation of the run on its test classes."""
        reads = self._reads()
        write_json(self.reads, reads | {command: reads.get(command, 0) + 1})

    def _reads(self) -> dict[str, int]:
        try:
            return json.loads(self.reads.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{self.reads}: is damaged ({error})") from None

    def create(self) -> None:
        """Creates the directory.

        Raises:
          UserError: it cannot be created or written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be created ({error.strerror})"
            raise UserError(f"--workdir={self.root}: {reason}") from None
        if not os.access(self.root, os.W_OK):
            raise UserError(f"--workdir={self.root}: is not writable")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the directory; the system releases the lock when the process ends.

        Raises:
          UserError: another process has the lock, the directory cannot be created or written, or
            the disk is full.
        """
        self.create()
        busy = (
            f"--workdir={self.root}: another run is using it (choose another directory, or "
            "wait until it ends)"
        )
        with locked(self.root / ".lock", busy=busy):
            try:
                yield
            except OSError as error:
                if error.errno not in DISK_ERRORS:
                    raise
                raise UserError(
                    f"--workdir={self.root}: cannot be written ({error.strerror}); fix "
                    "this and run the same command again to continue"
                ) from error

    def stored(self) -> tuple[str, ExperimentConfig] | None:
        """Returns experiment name and configuration of the run in the directory, or None.

        Raises:
          UserError: the file is not a configuration.
        """
        if not self.config.is_file():
            return None
        try:
            content = json.loads(self.config.read_text("utf-8"))
            return content["experiment"], configuration.from_dict(content["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config}: is not a stored configuration ({error})") from None

    def claim(self, experiment: str, config: ExperimentConfig) -> None:
        """Stores the configuration of a run, or checks it against the stored one.

        Raises:
          UserError: the configurations differ; the message lists the fields.
        """
        if stored := self.stored():
            if changed := configuration.differences(stored[1], config):
                raise UserError(
                    f"--workdir={self.root} contains a run with another configuration: "
                    + "; ".join(changed)
                    + " (choose another --workdir, or the stored values)"
                )
            return
        write_json(self.config, {"experiment": experiment, "config": configuration.to_dict(config)})

    def confirm(self, fingerprint: str) -> None:
        """Checks that the images are those that the run started with (`split.json`).

        Raises:
          UserError: the data set has changed.
        """
        try:
            stored = json.loads(self.split.read_text("utf-8"))["fingerprint"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.split}: is not a stored split ({error})") from None
        if stored != fingerprint:
            raise UserError(
                f"--workdir={self.root} contains a run on other images: fingerprint "
                f"{stored[:12]} -> {fingerprint[:12]} (choose another --workdir, or restore the "
                "data set)"
            )

    def confirm_weights(self, record: Mapping[str, Any] | None) -> None:
        """Stores the initial weights of a run, or checks them against the stored record.

        Args:
          record: of the weights (`Pretrained.record`); None for random weights.

        Raises:
          UserError: the weights file has changed.
        """
        if record is None:
            return
        if not self.weights.is_file():
            write_json(self.weights, dict(record))
            return
        try:
            stored = json.loads(self.weights.read_text("utf-8"))["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.weights}: is not a record of weights ({error})") from None
        if stored != record["sha256"]:
            raise UserError(
                f"--workdir={self.root} started from other weights: sha256 {stored[:12]} -> "
                f"{record['sha256'][:12]} (choose another --workdir, or restore the file)"
            )
