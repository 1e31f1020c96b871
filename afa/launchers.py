"""Processes and GPUs from the environment variables of SLURM, Open MPI and TPU slices."""

import re
from collections.abc import Mapping

# Environment variables of launchers: number of processes -> variables that each process also has.
# The script of a SLURM batch job has the number but no step: it is one process until `srun`.
PROCESS_COUNTS = {
    "SLURM_NTASKS": ("SLURM_PROCID", "SLURM_STEP_NODELIST"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK",),
}
# Number of processes on this machine, and the number of this one there.
LOCAL_PROCESSES = (
    ("SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the numbers of the GPUs that this process of SLURM or Open MPI uses, counted among
    those that it sees; None without such a launcher or without GPUs: JAX decides.

    JAX takes the GPU of the process's number on its machine. That is wrong if the process sees only
    one GPU (`--gpus-per-task`), which has number 0, and if it is alone on its machine and sees all.
    """
    for size, rank in LOCAL_PROCESSES:
        if rank in environment and environment.get(size):
            # "2(x3),1": two processes on each of three machines, one on the next.
            processes = int(re.match(r"\d+", environment[size])[0])  # pyright: ignore
            own = int(environment[rank])
            break
    else:
        return None
    visible = [each for each in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    on_node = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    count = len(visible) or on_node
    if not count:
        return None
    share = count // processes
    if share == 0 or on_node > count:  # the process sees only its own
        return list(range(count))
    return list(range(own % processes * share, (own % processes + 1) * share))


def processes(environment: Mapping[str, str]) -> int:
    """Returns the number of processes from the environment of a launcher; 1 without a launcher."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    counts = [len(names) if all(names) else 1]
    for count, others in PROCESS_COUNTS.items():
        if environment.get(count, "").isdecimal() and all(name in environment for name in others):
            counts.append(int(environment[count]))
    return max(counts)
