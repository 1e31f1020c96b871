"""The only file that knows devices.

A step is written for one device on its share of the batch and calls `pmean`, `all_gather` and
`sample_keys`, which see all devices inside a mapped step and one device outside of it. So the same
function runs unmapped (tests, notebooks), under `pmap` on one host, and under `shard_map` when
several processes form one machine.

Conventions: a batch is a pytree of host arrays whose leading axis is this process's share of the
global batch; a state is an ordinary pytree, the same on every device, saved as it is.

Gradients: differentiate the per-device loss, then `pmean` the gradients. Because `psum` transposes
to `psum`, that is the gradient of the mean of all devices' losses, also through `all_gather`.
"""

import contextlib
import functools
import json
import os
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

from afa.errors import UserError

AXIS = "data"
Impl = Literal["auto", "pmap", "shard_map"]
T = TypeVar("T")
# Variables of launchers: number of processes -> what every one of them has beside it. The script of
# a SLURM batch job has the number, but no step: it is a single process until `srun` starts some.
PROCESS_COUNTS = {
    "SLURM_NTASKS": ("SLURM_PROCID", "SLURM_STEP_NODELIST"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK",),
}
MESSAGE_BYTES = 4096  # of an error that processes tell each other
_ACCELERATED: ContextVar[bool | None] = ContextVar("accelerated", default=None)


def start(coordinator: str, processes: int = 1, index: int = 0) -> None:
    """Joins the processes of one run; to be called before anything asks JAX for devices.

    Args:
      coordinator: "host:port" of process 0. "auto": as SLURM, Open MPI or the hosts of a TPU slice
        say in the environment, if they say so. "environment": as JAX finds by itself, which also
        asks the metadata server of a TPU VM. "none": a single process.
      processes: their number, with "host:port".
      index: which one this is, with "host:port".

    Raises:
      UserError: the processes did not find each other.
    """
    if coordinator == "none" or (coordinator == "auto" and environment_processes() < 2):
        return
    if jax.distributed.is_initialized():  # by an earlier run of the same notebook or program
        return
    found = coordinator not in ("auto", "environment")
    try:
        if found:
            jax.distributed.initialize(coordinator, processes, index)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"launch.coordinator={coordinator!r}: {reason}") from None


def environment_processes() -> int:
    """Number of processes that a launcher announces in the environment; 1 without one."""
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    counts = [len(names) if all(names) else 1]
    for count, others in PROCESS_COUNTS.items():
        if os.environ.get(count, "").isdecimal() and all(name in os.environ for name in others):
            counts.append(int(os.environ[count]))
    return max(counts)


def together(action: Callable[[], T]) -> T:
    """Runs `action` in every process; a user's mistake in any of them ends all of them.

    Every process has to call it.

    Raises:
      UserError: that of the first process that has one.
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
        if said := each.tobytes().rstrip(b"\0").decode(errors="ignore"):
            raise UserError(said)
    return cast(T, result)


def first_only(action: Callable[[], T]) -> T | None:
    """Runs `action` in the first process; None in the others. Otherwise as `together`."""
    return together(lambda: action() if jax.process_index() == 0 else None)


def from_first(value: Any) -> Any:
    """JSON values of the first process, in every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int64(len(text))))
    sent = np.frombuffer(text.ljust(length, b" "), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())


def share(rows: int) -> slice:
    """This process's part of so many rows; all of them where there are fewer than processes."""
    count = jax.process_count()
    if rows < count:
        return slice(0, rows)
    index, size = jax.process_index(), -(-rows // count)
    return slice(min(index * size, rows), min((index + 1) * size, rows))


def gather_shares(tree: PyTree, rows: int) -> PyTree:
    """Host arrays of every process's `share` of the rows, joined in order, in every process."""
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


def end_together(name: str) -> None:
    """Waits until every process has come here; a process that ends early would end the others."""
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
    """True on a GPU or TPU, False when JAX has only the CPU; inside `lowered_for`, as it says."""
    told = _ACCELERATED.get()
    if told is None:
        require_devices()
        return jax.default_backend() != "cpu"
    return told


def require_devices() -> None:
    """Looks whether JAX can compute on what it was asked for.

    Raises:
      UserError: it cannot (`JAX_PLATFORMS=cuda` on a machine without a GPU); what it can is named.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second is JAX's for cuda alone
        asked = _asked_platforms()
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "no such device"
        field = f"JAX_PLATFORMS={asked}" if asked else "JAX"
        raise UserError(f"{field}: {reason}; usable here: {', '.join(_usable())}") from None


def _usable() -> list[str]:
    """Platforms that JAX finds when it may choose; what was asked for is asked for again later."""
    asked = _asked_platforms()
    jax.config.update("jax_platforms", "")
    try:
        return sorted(backend.backends())
    except RuntimeError:
        return ["none"]
    finally:
        jax.config.update("jax_platforms", asked)
        if asked:
            backend.clear_backends()


def _asked_platforms() -> str:
    return jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def lowered_for(accelerator: bool) -> Iterator[None]:
    """Inside, networks are built and traced for an accelerator, or for the CPU, wherever they are
    to run. Nothing traced inside may be kept by a function that is called outside too."""
    before = _ACCELERATED.set(accelerator)
    try:
        yield
    finally:
        _ACCELERATED.reset(before)


def platform() -> str:
    """What the run computes on, in words: `2 x TPU v5e`, `1 x cpu`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def peak_device_bytes() -> int | None:
    """Most bytes in use on the first device so far; None where the backend keeps no count."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


# ---- inside a step ----------------------------------------------------------------------------


def axis_size() -> int:
    """Devices that share this step: 1 outside of a mapped function."""
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
    """Joins every device's rows (axis 0), in device order: the rows of the global batch."""
    return tree if axis_size() == 1 else lax.all_gather(tree, AXIS, tiled=True)


def sample_keys(key: Key[Array, ""], rows: int) -> Key[Array, "rows"]:
    """One key a row, by its place in the global batch: any device count draws the same numbers."""
    place = jnp.arange(rows) + axis_index() * rows
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(place)


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
      step: pure; sees this device's rows of `batch`; returns a state and outputs that are the same
        on every device (it has called `pmean` where needed).
      impl: "pmap" (one host), "shard_map" (any number of processes) or "auto".

    Returns:
      A function of the state and this process's share of the global batch (host arrays).

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
        # A leading axis of one, squeezed away, as pmap has it: XLA then makes the same program.
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
    """Cuts a process's rows into one block a local device."""
    devices = jax.local_device_count()
    if len(rows) % devices:
        raise UserError(f"a batch of {len(rows)} rows cannot be divided among {devices} devices")
    return rows.reshape(devices, len(rows) // devices, *rows.shape[1:])


def global_rows(mesh: Mesh, rows: Shaped[np.ndarray, "n ..."]) -> Array:
    """This process's rows, cut into blocks, as its share of one array over all devices."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_process_local_data(sharding, split_rows(rows))


def replicate(tree: PyTree) -> PyTree:
    """Puts the same values on every device of every process; free when they are there already."""
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
    """Puts the same values on each of this process's devices: a `shared` of `map_rows` to keep."""
    mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def replicated_shapes(tree: PyTree) -> PyTree:
    """Shapes of a tree that lies on every device: what a checkpoint is restored into, whatever
    devices wrote it."""
    sharding = NamedSharding(_mesh(), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def preempted(step: int, signalled: bool) -> bool:
    """Whether this run is to save and leave now; all processes answer the same at a step.

    `signalled` is what this process's own signal handler saw; with several processes the
    coordination service makes them agree on one step.
    """
    if jax.process_count() == 1:
        return signalled
    return multihost_utils.reached_preemption_sync_point(step)


def map_rows(function: Callable) -> Callable:
    """Maps `function(shared, rows) -> rows` over this process's devices.

    `rows` (a pytree of host arrays with one leading axis) is padded to a multiple of the device
    count by repeating its last row, and the padding is cut off again; `shared` is the same on
    every device and is not donated. Each process maps its own rows: there are no collectives.
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


def compiled_once(function: Callable) -> Callable:
    """`jax.jit` for what is called once: the CPU's compiler would spend seconds on its speed."""
    hasty = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = jax.jit(function, compiler_options=None if accelerated() else hasty)

    def run(*args: Any) -> Any:
        # Inside of another trace (`jax.eval_shape`) options are refused, and nothing is compiled.
        traced = any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(args))
        return function(*args) if traced else compiled(*args)

    return run


def to_host(tree: PyTree) -> PyTree:
    """Replicated device values, or what is on the host already, as NumPy arrays."""

    def host(leaf: Any) -> np.ndarray:
        return np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)

    return jax.tree.map(host, tree)


def local(tree: PyTree) -> PyTree:
    """Replicated values in a form that one process can compute with by itself."""
    return tree if jax.process_count() == 1 else to_host(tree)


def local_blocks(rows: int, block: int) -> Iterator[slice]:
    """Consecutive slices of at most `block` rows."""
    for begin in range(0, rows, block):
        yield slice(begin, min(begin + block, rows))
