"""The training loop: stages of steps, log lines, evaluations, checkpoints, preemption."""

import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from afa import parallel
from afa.config import ExperimentConfig, OptimConfig, generator_data, steps_of
from afa.console import Progress
from afa.data.pipeline import TrainPipeline
from afa.errors import TrainingDiverged, UserError
from afa.train import health, steps
from afa.train.checkpoint import Checkpoints, Position
from afa.train.logging import MetricWriter
from afa.train.state import TrainState

NEVER_ZERO = 10**9  # total of steps, so large that no percentage rounds to 0

Evaluate = Callable[[TrainState], Mapping[str, float]]


class Preempted(Exception):
    """SIGTERM or Ctrl-C stopped the run; its state is saved.

    Attributes:
      step: the last completed step.

    >>> import afa
    >>> print(afa.Preempted(120))
    stopped by a signal after step 120; everything is saved
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"stopped by a signal after step {step}; everything is saved")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `begin` to `end` - 1 of a run, with one step function and one batch size."""

    name: str
    begin: int
    end: int
    step: Callable
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a run.

    Attributes:
      small: the first steps of F, on smaller images (Tan & Le 2021, section 4, for the idea).
      plain: the first steps of F, without feature augmentation.
      embedder_steps: steps that train F.
      generator_steps: steps that train G and D: after those of F or, in a joint schedule, the same.
      total: total number of steps.
      log_every, evaluate_every, checkpoint_every: in steps; 0: never.
    """

    small: int
    plain: int
    embedder_steps: int
    generator_steps: int
    total: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @property
    def generator_begin(self) -> int:
        """Number of steps before G is trained; 0 without G. Only later checkpoints can be the best
        of a run, because search also uses the view of G."""
        return self.total - self.generator_steps if self.generator_steps else 0


def plan(config: ExperimentConfig, epoch: int) -> Plan:
    """Converts all durations of the configuration to steps.

    Raises:
      UserError: a field is not a duration, gives 0 steps, or more steps than there are; or small
        images in a joint schedule.
    """
    train, adversarial = config.train, config.adversarial
    count = functools.partial(steps_of, epoch=epoch)
    embedder = _at_least_one("train.steps", train.steps, count("train.steps", train.steps, total=0))
    small = count("train.small_steps", train.small_steps, total=embedder)
    plain, adversarial_steps, total = embedder, 0, embedder
    if adversarial.enabled and adversarial.feature_epsilon > 0:
        plain = min(count("train.plain", train.plain, total=embedder), embedder)
    if adversarial.enabled and adversarial.generator and train.schedule == "joint":
        adversarial_steps = embedder
        if small:
            raise UserError(
                f"train.small_steps={train.small_steps!r} needs train.schedule='staged': G works "
                "at one image size"
            )
    elif adversarial.enabled and adversarial.generator:
        batches = max(epoch * config.data.batch_size // generator_data(config).batch_size, 1)
        name, value = "train.generator_steps", train.generator_steps
        adversarial_steps = _at_least_one(
            name, value, steps_of(name, value, epoch=batches, total=embedder)
        )
        total = embedder + adversarial_steps
    counts = {"F": embedder, "G and D": adversarial_steps}
    _check_durations(config.optim, {name: n for name, n in counts.items() if n}, epoch)
    every = {}
    for field in ("log_every", "evaluate_every", "checkpoint_every"):
        name, value = f"train.{field}", getattr(train, field)
        # A percentage of few steps may round to 0; only 0 itself means never.
        enabled = steps_of(name, value, total=NEVER_ZERO, epoch=NEVER_ZERO) > 0
        every[field] = max(count(name, value, total=total), 1) if enabled else 0
    return Plan(min(small, embedder), plain, embedder, adversarial_steps, total, **every)


def _at_least_one(field: str, value: str, steps: int) -> int:
    """Returns the number of steps.

    Raises:
      UserError: it is 0.
    """
    if steps < 1:
        raise UserError(f"{field}={value!r} gives 0 steps (allowed: at least 1)")
    return steps


def _check_durations(optim: OptimConfig, counts: Mapping[str, int], epoch: int) -> None:
    """Checks the durations of the optimiser against the number of steps of each network.

    Raises:
      UserError: the warm-up or the accumulation is longer than training.
    """
    for network, total in counts.items():
        if optim.accumulate > total:
            raise UserError(
                f"optim.accumulate={optim.accumulate} is more than the {total} steps of {network}: "
                "no parameter would be updated"
            )
        for field in ("warmup", "head_warmup") if network == "F" else ("warmup",):
            value = getattr(optim, field)
            if (steps := steps_of(f"optim.{field}", value, total=total, epoch=epoch)) > total:
                raise UserError(
                    f"optim.{field}={value!r} is {steps} steps, more than the {total} of {network}"
                )


def _due(every: int, done: int, ends: bool) -> bool:
    """Whether an action is due after step `done`: every `every` steps and at the end of a stage."""
    return every > 0 and (done % every == 0 or ends)


def stages(context: steps.StepContext, plan: Plan) -> list[Stage]:
    """Returns the stages of a run: F, F with perturbed features, G and D; or the joint stages."""
    config = context.config
    joint = config.train.schedule == "joint" and plan.generator_steps > 0
    adversarial_data = generator_data(config)
    function = steps.joint_step if joint else steps.embedder_step
    prefix = "joint" if joint else "F"

    def mapped(step: Callable, **bound: Any) -> Callable:
        bound_step = functools.partial(step, context=context, **bound)
        return parallel.data_parallel(bound_step, config.train.parallel)

    ends, size = (plan.plain, plan.embedder_steps, plan.total), config.data.batch_size
    all_stages = [
        Stage(prefix, 0, ends[0], mapped(function, perturb=False), size),
        Stage(f"{prefix} + perturbation", ends[0], ends[1], mapped(function, perturb=True), size),
        Stage(
            "G and D", ends[1], ends[2], mapped(steps.generator_step), adversarial_data.batch_size
        ),
    ]
    return [stage for stage in all_stages if stage.begin < stage.end]


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGTERM or SIGINT was received, as a function; a second one acts as usual.

    With several processes, SIGTERM belongs to JAX, which has all of them agree about a step
    (`parallel.preempted`): a handler of Python would replace the one that JAX has installed.
    """
    seen = False
    main = threading.current_thread() is threading.main_thread()
    if not main or parallel.process_count() > 1:
        yield lambda: seen
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, _frame: Any) -> None:
        nonlocal seen
        seen = True
        signal.signal(number, before[signal.Signals(number)])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield lambda: seen
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


class Stopwatch:
    """Time in training steps in seconds, over all starts of a run."""

    def __init__(self, seconds: float) -> None:
        self._before, self._began = seconds, time.perf_counter()
        self._lap = seconds

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    def lap(self) -> float:
        """Seconds since the last lap."""
        begun, self._lap = self._lap, self.seconds
        return self._lap - begun

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the clock inside."""
        self._before = self.seconds
        try:
            self._began = time.perf_counter()
            yield
        finally:
            self._began = time.perf_counter()


def train(
    context: steps.StepContext,
    plan: Plan,
    state: TrainState,
    position: Position,
    pipeline: TrainPipeline,
    checkpoints: Checkpoints,
    writer: MetricWriter | None,
    evaluate: Evaluate,
) -> tuple[TrainState, float]:
    """Runs the steps from `position` to the end of the plan.

    `writer` is None in all processes but the first.

    The losses of each step are checked for NaN one step late, so the devices never wait for the
    host. Before a checkpoint is written, all steps and the state are checked.

    Returns:
      The last state, and the time in training steps in seconds, over all starts of the run.

    Raises:
      TrainingDiverged: a loss, a gradient or the state is not finite.
      Preempted: stopped by a signal; the state is saved.
      UserError: a checkpoint or log line could not be written.
    """
    config, total = context.config, plan.total
    all_stages = stages(context, plan)
    probe = parallel.data_parallel(
        functools.partial(steps.probe_step, context=context), config.train.parallel
    )
    clock = Stopwatch(position.train_seconds)
    pending = list(position.pending)  # metrics of the steps since the last log line
    logged = position.batch  # step at which the lap of the clock started
    unchecked: tuple[int, Any] | None = None

    def check() -> None:
        nonlocal unchecked
        if unchecked is None:
            return
        number, metrics = unchecked
        # Python numbers, because a checkpoint stores the pending metrics as JSON.
        pending.append({name: x.tolist() for name, x in parallel.to_host(metrics).items()})
        unchecked = None
        if part := health.first_not_finite(pending[-1]):
            raise TrainingDiverged(number, part, checkpoints.latest())

    def check_all(step: int, state: TrainState) -> None:
        check()
        if part := health.first_part_not_finite(state):
            raise TrainingDiverged(step, part, checkpoints.latest())

    def log(step: int, stage: str, figures: Mapping[str, float]) -> None:
        if writer is not None:
            writer.log(step, stage, figures)

    with Progress(total, *(stage.name for stage in all_stages)) as progress, signals() as stop:
        batches = pipeline.iterate(position.batch, total)
        for done, batch in enumerate(batches, start=position.batch + 1):
            stage = next(each for each in all_stages if done <= each.end)
            state, metrics = stage.step(state, batch)
            check()
            unchecked = (done, metrics)
            ends = done == stage.end
            if plan.log_every == 0:
                pending.clear()
            if _due(plan.log_every, done, ends):
                check()
                rate = (done - logged) * stage.batch_size / clock.lap()
                logged = done
                line = health.summarise(pending, config.data.corruptions)
                pending.clear()
                if "generator_loss" in line:
                    state, figures = probe(state, batch)
                    line |= {name: float(x) for name, x in parallel.to_host(figures).items()}
                line = {"loss": line.get("metric_loss", line.get("generator_loss", 0.0))} | line
                log(done, stage.name, line | {"images_per_second": rate})
                progress.update(done, stage.name, line, rate)
                if worse := health.worsened(line, config.data.corruptions, ends):
                    progress.note(f"step {done}: {worse}")
            measured: Mapping[str, float] = {}
            if _due(plan.evaluate_every, done, ends):
                check_all(done, state)
                with clock.stopped():
                    measured = evaluate(state)
                log(done, stage.name, {f"validation/{k}": v for k, v in measured.items()})
                figures = ", ".join(f"{k} {100 * v:.1f} %" for k, v in measured.items())
                progress.note(f"step {done}: validation {figures}")
            # After the evaluation, so that the checkpoint includes it.
            leaving = parallel.preempted(done, stop())
            due = ends or _due(plan.checkpoint_every, done, ends)
            if due or measured or leaving:
                if not measured:
                    check_all(done, state)
                if writer is not None:
                    writer.flush()
                with clock.stopped():
                    at = Position(done, clock.seconds, pending)
                    candidate = measured if done > plan.generator_begin else {}
                    checkpoints.save(state, at, config, dict(candidate) or None)
            if leaving:
                checkpoints.finish()
                raise Preempted(done)
    checkpoints.finish()
    return state, clock.seconds
