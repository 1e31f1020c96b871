"""Checkpoints (Orbax): the state, the data position, the timer and the configuration.

Saves run in the background. The latest and the best by a validation metric are kept. If the process
is killed during a save, older checkpoints remain valid.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from afa import config as configuration
from afa import parallel
from afa.config import ExperimentConfig
from afa.errors import UserError
from afa.train.state import TrainState

METRIC = "map_at_r"
MIB = 2**20
SPARE_BYTES = MIB  # for metadata in addition to the arrays
WRITE_ERRORS = (OSError, ValueError, RuntimeError)  # errors that Orbax raises for a full disk


@dataclasses.dataclass(frozen=True)
class Position:
    """Progress of a run, saved with its state.

    Attributes:
      batch: next batch of the data stream; batches are a pure function of (seed, batch).
      train_seconds: time in training steps so far, over all starts of the run.
      pending: metrics of the steps since the last log line, as JSON values. The next log line is
        their mean, also after a restart.
    """

    batch: int
    train_seconds: float
    pending: Sequence[Mapping[str, Any]] = ()


def _metric(metrics: dict[str, float]) -> float:
    # A NaN would count as the best checkpoint and replace a good one.
    value = float(metrics[METRIC])
    return value if math.isfinite(value) else -math.inf


def _reason(error: Exception) -> str:
    return f"could not be written: {str(error).partition(chr(10))[0]}"


def _not_about_pmap(record: logging.LogRecord) -> bool:
    """Drops Orbax's warning about arrays of `jax.pmap` in JAX 0.7: it cannot store how they are
    divided among devices, and `Checkpoints.restore` does not ask for that."""
    return "PmapSharding" not in record.getMessage()


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep_best: int) -> None:
        best = policies.BestN(
            get_metric_fn=_metric, n=keep_best, keep_checkpoints_without_metrics=False
        )
        logging.getLogger().addFilter(_not_about_pmap)
        kept = [policies.LatestN(1)] + ([best] if keep_best else [])
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=_metric,
                cleanup_tmp_directories=parallel.process_index() == 0,
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the kept step with the highest validation metric; None without any metric."""
        return self._manager.best_step()

    def save(
        self,
        state: TrainState,
        position: Position,
        config: ExperimentConfig,
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts a save; returns when the values have been copied from the devices.

        Raises:
          UserError: the disk is full, or the directory cannot be written.
        """
        step = position.batch
        extra = {"position": dataclasses.asdict(position), "config": configuration.to_dict(config)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
            extra=ocp.args.JsonSave(extra),  # pyright: ignore[reportCallIssue]
        )
        self.finish()
        if step in self._manager.all_steps():
            return
        self._check_space(step, state)
        try:
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except WRITE_ERRORS as error:
            raise UserError(f"checkpoint of step {step} {_reason(error)}") from error

    def _check_space(self, step: int, state: TrainState) -> None:
        """Checks the free space: on a full disk, Orbax would leave an incomplete checkpoint."""
        needed = SPARE_BYTES + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._manager.directory).free
        if free < needed:
            raise UserError(
                f"checkpoint of step {step} needs {needed / MIB:.1f} MiB and {free / MIB:.1f} MiB "
                f"are free in {self._manager.directory}; free some space and run the same command "
                "again to continue from the last checkpoint"
            )

    def restore(
        self, like: TrainState, config: ExperimentConfig, step: int | None = None
    ) -> tuple[TrainState, Position]:
        """Returns the state and position of a step (default: the latest), on this run's devices.

        Raises:
          UserError: the checkpoint has another configuration; the message lists the fields.
        """
        step = self.latest() if step is None else step
        extra = self._manager.restore(
            step,
            args=ocp.args.Composite(extra=ocp.args.JsonRestore()),  # pyright: ignore[reportCallIssue]
        )["extra"]
        stored = configuration.from_dict(extra["config"])
        if changed := configuration.differences(stored, config):
            raise UserError(
                f"the checkpoint of step {step} was written with another configuration: "
                + "; ".join(changed)
                + " (choose another --workdir, or the stored values)"
            )
        state = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(parallel.replicated_shapes(like))  # pyright: ignore[reportCallIssue]
            ),
        )["state"]
        return state, Position(**extra["position"])

    def finish(self) -> None:
        """Waits for the running save.

        Raises:
          UserError: the checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except WRITE_ERRORS as error:
            raise UserError(f"the last checkpoint {_reason(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error, closing may fail for the same reason, which is already reported.
        with contextlib.suppress(*WRITE_ERRORS if error else ()):
            self._manager.close()
