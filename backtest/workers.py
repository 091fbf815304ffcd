"""Jobs on the cores of this machine or on a cluster: joblib, with a backend by name, and files of theirs."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from logging import CRITICAL
from pathlib import Path
from threading import get_native_id
from typing import Any

from barcast.models import ConfigError

BACKENDS = ("loky", "ray", "dask")

ONE_THREAD = dict.fromkeys(
    ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
"""What the environment of a worker must say before it imports anything: the cores are for other jobs."""

IDLE_SECONDS = 20
"""After how long without a job a process of `loky` ends, also when whoever began it was killed."""


@contextmanager
def open_workers(backend: str, jobs: int, address: str | None) -> Iterator[None]:
    """Let `run_jobs` have so many workers on this machine (-1: one a core), or those of a running cluster.

    The backend `loky` has processes of this machine alone, `ray` and `dask` know an `address`. Raise
    ConfigError for a backend that there is not or that is not installed, and for an address that does not
    answer.
    """
    from joblib import parallel_config

    if backend not in BACKENDS:
        raise ConfigError(f"backend = {backend!r}: take one of {', '.join(BACKENDS)}")
    check_jobs(jobs)
    if address is not None and backend == "loky":
        raise ConfigError(f"address = {address!r}: loky has no cluster; name the backend ray or dask")
    with ExitStack() as stack:
        try:
            if backend == "ray":
                _ray(stack, jobs, address)
            elif backend == "dask":
                _dask(stack, jobs, address)
        except ImportError as error:
            raise ConfigError(
                f"backend = {backend!r}: pip install 'barcast[cluster]', or take loky"
            ) from error
        except (OSError, ValueError) as error:  # nobody answers, or it is no address at all
            if address is None:
                raise
            token = ", and if it asks for a token set RAY_AUTH_MODE=token" if backend == "ray" else ""
            raise ConfigError(f"address = {address!r}: {error}; name a {backend} that runs{token}") from error
        stack.enter_context(
            parallel_config(backend, n_jobs=jobs, inner_max_num_threads=1, idle_worker_timeout=IDLE_SECONDS)
            if backend == "loky"
            else parallel_config(backend, n_jobs=-1)
        )
        yield


def check_jobs(jobs: int) -> None:
    """Raise ConfigError for a number of jobs at a time that there cannot be."""
    if jobs == 0 or jobs < -1:
        raise ConfigError(f"jobs = {jobs}: take 1 or more, or -1 for one a core")


def run_jobs(function: Callable[[Any], None], jobs: Iterable[Any], done: Callable[[int], None]) -> None:
    """Call the function with each job on the workers that are open; `done` is told how many are over.

    The first error ends it and is raised.
    """
    from joblib import Parallel, delayed

    parallel = Parallel(batch_size=1)
    parallel.print_progress = lambda: done(parallel.n_completed_tasks)  # ray has no results as they come
    parallel(delayed(function)(job) for job in jobs)


@contextmanager
def writing_in(folder: Path | None) -> Iterator[None]:
    """Say in a sentence what forbids writing into a folder, here or where a worker is: raise ConfigError.

    None is the folder for temporary files.
    """
    try:
        yield
    except OSError as error:
        place, name = folder or tempfile.tempdir or "temporary files", "name" if folder else "let TMPDIR name"
        raise ConfigError(f"{place}: {error}; {name} a folder that you may write, with room in it") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, of which nobody sees a part, also where others write the same one.

    The partial is of one thread of one machine. Raise ConfigError where the folder cannot be written.
    """
    partial = path.with_name(f".{path.stem}.{os.uname().nodename}.{get_native_id()}.partial")
    with writing_in(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError:  # such as a full disk: what is there of it would only take room
            partial.unlink(missing_ok=True)
            raise


def remove_partials(folder: Path) -> None:
    """Remove what `write_whole` has left in a folder of threads of this machine that were killed.

    Those of other machines are left: nobody here knows whether they are at work. Raise ConfigError where the
    folder cannot be written.
    """
    own = re.compile(rf"\.[^.]+\.{re.escape(os.uname().nodename)}\.(\d+)\.partial")
    with writing_in(folder):
        for path in folder.glob(".*.partial"):
            if (found := own.fullmatch(path.name)) and not Path("/proc", found[1]).exists():
                path.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether it is what `write_whole` leaves of a file where it is killed."""
    return path.name.startswith(".") and path.suffix == ".partial"


def _ray(stack: ExitStack, jobs: int, address: str | None) -> None:
    import ray
    from ray.util.joblib import register_ray

    own = {} if address else {"num_cpus": None if jobs < 0 else jobs, "include_dashboard": False}
    stack.callback(ray.shutdown)
    ray.init(address, runtime_env={"env_vars": ONE_THREAD}, log_to_driver=False, **own)
    register_ray()


def _dask(stack: ExitStack, jobs: int, address: str | None) -> None:
    from distributed import Client, LocalCluster

    cluster: Any = address
    if address is None:
        local = {"n_workers": None if jobs < 0 else jobs, "threads_per_worker": 1, "env": ONE_THREAD}
        cluster = LocalCluster(**local, dashboard_address=None, silence_logs=CRITICAL)
        stack.enter_context(cluster)
    stack.enter_context(Client(cluster))
