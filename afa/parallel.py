"""Devices and processes. No other module uses devices, meshes, pmap or shard_map.

A step is written for one device and its part of the batch. It calls `pmean`, `all_gather` and
`sample_keys`, which act on all devices inside a mapped step and on one device outside. So the same
function runs unmapped (tests, notebooks), under `pmap` on one host, and under `shard_map` with
several processes.

Conventions: a batch is a pytree of host arrays whose leading axis is this process's part of the
global batch; a state is a pytree with the same values on every device.

Gradients: differentiate the per-device loss, then `pmean` the gradients. Because `psum` transposes
to `psum`, this is the gradient of the mean of all devices' losses, also through `all_gather`.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.experimental import multihost_utils
from jax.extend import backend
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree, Shaped

from afa import launchers
from afa.errors import UserError

AXIS = "data"
Impl = Literal["auto", "pmap", "shard_map"]
T = TypeVar("T")
MESSAGE_BYTES = 4096  # size of an error message exchanged between processes
_ACCELERATED: ContextVar[bool | None] = ContextVar("accelerated", default=None)


def start(coordinator: str, processes: int = 1, index: int = 0) -> None:
    """Initialises `jax.distributed`; call it before JAX is asked for devices.

    Args:
      coordinator: "host:port" of process 0. "auto": from the environment variables of SLURM, Open
        MPI or a TPU slice, if set. "environment": detected by JAX, which also queries the metadata
        server of a TPU VM. "none": a single process.
      processes: number of processes, for "host:port".
      index: index of this process, for "host:port".

    Raises:
      UserError: the processes cannot connect.
    """
    if coordinator == "none" or (coordinator == "auto" and launchers.processes(os.environ) < 2):
        return
    if jax.distributed.is_initialized():  # by an earlier run in the same notebook or program
        return
    gpus = launchers.local_gpus(os.environ)
    try:
        if coordinator not in ("auto", "environment"):
            jax.distributed.initialize(coordinator, processes, index, gpus)
        else:
            jax.distributed.initialize(local_device_ids=gpus)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"launch.coordinator={coordinator!r}: {reason}") from None


def together(action: Callable[[], T]) -> T:
    """Runs `action` in every process; a user error in one process is raised in all.

    Every process has to call it.

    Raises:
      UserError: the error of the first process that has one.
    """
    if jax.process_count() == 1:
        return action()
    message, result = "", None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    text = np.frombuffer(message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.uint8)
    for each in multihost_utils.process_allgather(text):
        if message := each.tobytes().rstrip(b"\0").decode(errors="ignore"):
            raise UserError(message)
    return cast(T, result)


def first_only(action: Callable[[], T]) -> T | None:
    """As `together`, but runs `action` only in the first process; returns None in the others."""
    return together(lambda: action() if jax.process_index() == 0 else None)


def from_first(value: Any) -> Any:
    """Returns the JSON values of the first process in every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int64(len(text))))
    sent = np.frombuffer(text.ljust(length, b" "), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())


def share(rows: int) -> slice:
    """Returns this process's part of the rows; all rows if there are fewer than processes."""
    count = jax.process_count()
    if rows < count:
        return slice(0, rows)
    index, size = jax.process_index(), -(-rows // count)
    return slice(min(index * size, rows), min((index + 1) * size, rows))


def gather_shares(tree: PyTree, rows: int) -> PyTree:
    """Concatenates the host arrays of every process's `share` of the rows, in every process."""
    count = jax.process_count()
    if count == 1 or rows < count:
        return tree
    size = -(-rows // count)

    def joined(part: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *part.shape[1:]), part.dtype)
        padded[: len(part)] = part
        every = multihost_utils.process_allgather(padded)
        return np.asarray(every).reshape(-1, *part.shape[1:])[:rows]

    return jax.tree.map(joined, tree)


def device_sum() -> int:
    """Returns the sum of a 1 from every device of all processes: whether they can communicate."""

    def one(state: Array, batch: Array) -> tuple[Array, Array]:
        return state, lax.psum(jnp.sum(batch), AXIS)

    ones = np.ones(local_device_count(), np.int32)
    return int(local(data_parallel(one)(np.int32(0), ones)[1]))


def clock_skew() -> float:
    """Returns the largest difference between the clocks of the processes, in seconds; it includes
    the time that they take to answer."""
    if jax.process_count() == 1:
        return 0.0
    multihost_utils.sync_global_devices("clock")
    second, rest = divmod(time.time(), 1)  # arrays of JAX have 32 bits
    every = multihost_utils.process_allgather(np.asarray([second, 1e6 * rest], np.int32))
    return float(np.ptp(every.astype(np.float64) @ [1.0, 1e-6]))


def end_together(name: str) -> None:
    """Waits for all processes; one that exits early would end the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def device_count() -> int:
    return jax.device_count()


def local_device_count() -> int:
    return jax.local_device_count()


def process_count() -> int:
    return jax.process_count()


def process_index() -> int:
    return jax.process_index()


def accelerated() -> bool:
    """True on a GPU or TPU, False on the CPU; inside `lowered_for`, the value it sets."""
    override = _ACCELERATED.get()
    if override is None:
        require_devices()
        return jax.default_backend() != "cpu"
    return override


def require_devices() -> None:
    """Checks that JAX can use the requested devices.

    Raises:
      UserError: it cannot (`JAX_PLATFORMS=cuda` without a GPU); the message lists usable platforms.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX raises the second for cuda only
        requested = _requested_platforms()
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "no such device"
        field = f"JAX_PLATFORMS={requested}" if requested else "JAX"
        raise UserError(f"{field}: {reason}; usable here: {', '.join(_usable())}") from None


def _usable() -> list[str]:
    """Platforms that JAX finds without a request; the request is restored afterwards."""
    requested = _requested_platforms()
    jax.config.update("jax_platforms", "")
    try:
        return sorted(backend.backends())
    except RuntimeError:
        return ["none"]
    finally:
        jax.config.update("jax_platforms", requested)
        if requested:
            backend.clear_backends()


def _requested_platforms() -> str:
    return jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def lowered_for(accelerator: bool) -> Iterator[None]:
    """Inside, networks are built and traced for an accelerator or for the CPU, independent of the
    machine. A function called both inside and outside must not cache its trace."""
    before = _ACCELERATED.set(accelerator)
    try:
        yield
    finally:
        _ACCELERATED.reset(before)


def platform() -> str:
    """Returns number and kind of the devices: `2 x TPU v5e`, `1 x cpu`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def peak_device_bytes() -> int | None:
    """Returns the peak memory of the first device in bytes; None if it is not measured."""
    return _memory("peak_bytes_in_use")


def device_memory_bytes() -> int | None:
    """Returns the memory that JAX may use on the first device in bytes; None if it is not known."""
    return _memory("bytes_limit")


def _memory(name: str) -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get(name)


# ---- inside a step ----------------------------------------------------------------------------


def axis_size() -> int:
    """Returns the number of devices of the step; 1 outside of a mapped function."""
    try:
        return lax.axis_size(AXIS)
    except NameError:
        return 1


def axis_index() -> Array | int:
    try:
        return lax.axis_index(AXIS)
    except NameError:
        return 0


def pmean(tree: PyTree) -> PyTree:
    return tree if axis_size() == 1 else lax.pmean(tree, AXIS)


def all_gather(tree: PyTree) -> PyTree:
    """Concatenates the rows (axis 0) of all devices, in device order: the global batch."""
    return tree if axis_size() == 1 else lax.all_gather(tree, AXIS, tiled=True)


def sample_keys(key: Key[Array, ""], rows: int) -> Key[Array, "rows"]:
    """Returns one key per row of the global batch, the same for any device count."""
    index = jnp.arange(rows) + axis_index() * rows
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


# ---- around a step ----------------------------------------------------------------------------


def _mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()), (AXIS,))


def _resolve(impl: Impl) -> Impl:
    if impl != "auto":
        return impl
    return "shard_map" if jax.process_count() > 1 else "pmap"


def data_parallel(step: Callable, impl: Impl = "auto") -> Callable:
    """Maps `step(state, batch) -> (state, outputs)` over all devices; donates the state.

    Args:
      step: pure; gets this device's rows of `batch`; returns a state and outputs that are the same
        on every device (it calls `pmean` where needed).
      impl: "pmap" (one host), "shard_map" (any number of processes) or "auto".

    Returns:
      A function of the state and this process's part of the global batch (host arrays).

    Raises:
      UserError: the batch cannot be divided evenly among the devices.
    """
    if _resolve(impl) == "pmap":
        mapped = jax.pmap(
            step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=(0,)
        )

        def run(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            return mapped(state, jax.tree.map(split_rows, batch))

        return run

    mesh = _mesh()
    replicated, by_row = PartitionSpec(), PartitionSpec(AXIS)

    def one_device(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        # Squeezes a leading axis of size 1, as pmap does: XLA then compiles the same program.
        return step(state, jax.tree.map(lambda rows: jnp.squeeze(rows, 0), batch))

    mapped = jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(replicated, by_row),
            out_specs=(replicated, replicated),
            check_vma=False,
        ),
        donate_argnums=(0,),
    )

    def run(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        return mapped(replicate(state), jax.tree.map(functools.partial(global_rows, mesh), batch))

    return run


def split_rows(rows: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "devices per ..."]:
    """Splits a process's rows into one block per local device."""
    devices = jax.local_device_count()
    if len(rows) % devices:
        raise UserError(f"a batch of {len(rows)} rows cannot be divided among {devices} devices")
    return rows.reshape(devices, len(rows) // devices, *rows.shape[1:])


def global_rows(mesh: Mesh, rows: Shaped[np.ndarray, "n ..."]) -> Array:
    """Returns a global array over all devices, to which this process contributes its rows."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_process_local_data(sharding, split_rows(rows))


def replicate(tree: PyTree) -> PyTree:
    """Copies values to every device of every process; no copy if they are there already."""
    sharding = NamedSharding(_mesh(), PartitionSpec())

    def put(leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def replicate_local(tree: PyTree) -> PyTree:
    """Copies values to each device of this process, for repeated use as `shared` of `map_rows`."""
    mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def replicated_shapes(tree: PyTree) -> PyTree:
    """Returns the shapes of a replicated tree. A checkpoint is restored into them, whatever devices
    wrote it."""
    sharding = NamedSharding(_mesh(), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def preempted(step: int, signalled: bool) -> bool:
    """Whether the run has to save and stop now; the same in all processes at a step.

    `signalled` is whether this process received a signal. With several processes, the coordination
    service chooses a common step.
    """
    if jax.process_count() == 1:
        return signalled
    return multihost_utils.reached_preemption_sync_point(step)


def map_rows(function: Callable) -> Callable:
    """Maps `function(shared, rows) -> rows` over this process's devices.

    `rows` (a pytree of host arrays with one leading axis) is padded to a multiple of the device
    count by repeating its last row, and the padding is removed from the result; `shared` is the
    same on every device and is not donated. Each process maps its own rows, without collectives.
    """
    mapped = jax.pmap(function, in_axes=(None, 0), devices=jax.local_devices())

    def run(shared: PyTree, rows: PyTree) -> PyTree:
        devices = jax.local_device_count()
        count = len(jax.tree.leaves(rows)[0])
        padding = -count % devices

        def block(leaf: np.ndarray) -> np.ndarray:
            leaf = np.asarray(leaf)
            if padding:
                leaf = np.concatenate([leaf, np.repeat(leaf[-1:], padding, axis=0)])
            return split_rows(leaf)

        out = mapped(shared, jax.tree.map(block, rows))
        return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:])[:count], out)

    return run


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, new arrays and unmapped functions are on the CPU, if JAX has it beside accelerators.

    For many small computations: an accelerator's compiler takes much longer than the CPU's.
    """
    if jax.default_backend() == "cpu":
        yield
        return
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        device = None
    with jax.default_device(device):
        yield


def compiled_once(function: Callable) -> Callable:
    """`jax.jit` on the CPU for a function called once: no optimisations that take seconds."""
    unoptimised = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = jax.jit(function, compiler_options=unoptimised)

    def run(*args: Any) -> Any:
        # Inside another trace (`jax.eval_shape`) JAX rejects options, and nothing is compiled.
        if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(args)):
            return function(*args)
        with on_cpu():
            return compiled(*args)

    return run


def flops(function: Callable, *args: PyTree) -> float:
    """Returns the floating-point operations of one call, as counted by XLA in the lowered program.

    It is lowered for the CPU where there is one, because JAX does not analyse programs of other
    platforms before they are compiled. Nothing is computed.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    with on_cpu():
        lowered = jax.jit(function).lower(*shapes)
        analysis = lowered.cost_analysis() or lowered.compile().cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


def to_host(tree: PyTree) -> PyTree:
    """Converts replicated device values or host values to NumPy arrays."""

    def host(leaf: Any) -> np.ndarray:
        return np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)

    return jax.tree.map(host, tree)


def local(tree: PyTree) -> PyTree:
    """Converts replicated values so that one process alone can compute with them."""
    return tree if jax.process_count() == 1 else to_host(tree)


def local_blocks(rows: int, block: int) -> Iterator[slice]:
    """Yields consecutive slices of at most `block` rows."""
    for begin in range(0, rows, block):
        yield slice(begin, min(begin + block, rows))
