"""Runs programs under mpiexec: as root, oversubscribed, with a time limit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def mpi_environment(extra=None):
    """Environment that lets the MPI of a wheel run as root with more ranks than cores."""
    environment = dict(
        os.environ,
        OMPI_ALLOW_RUN_AS_ROOT='1',
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM='1',
        PRTE_MCA_rmaps_default_mapping_policy=':oversubscribe',
        OMPI_MCA_rmaps_base_oversubscribe='1',  # Open MPI 4
        # Eight ranks on two cores: threads of BLAS would only step on each other's feet, and
        # a waiting rank should give way.
        OMPI_MCA_mpi_yield_when_idle='1',
        OMP_NUM_THREADS='1',
        OPENBLAS_NUM_THREADS='1',
        MPLBACKEND='Agg',
        PYTHONPATH=os.pathsep.join(
            [str(ROOT), *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
        ),
    )
    environment.update(extra or {})
    return environment


def mpiexec():
    """Path of mpiexec: beside the running Python, else on the PATH; None if there is none."""
    beside = Path(sys.executable).parent / 'mpiexec'
    return str(beside) if beside.exists() else shutil.which('mpiexec')


def run(n, argv, timeout=120, env=None):
    """Run ``mpiexec -n N python ARGV``.

    Returns:
        subprocess.CompletedProcess with stdout and stderr in `stdout` as text.

    Raises:
        TimeoutError: It ran longer than `timeout` seconds; all its processes were killed, and the
            message holds what it had printed.
    """
    process = subprocess.Popen(
        [mpiexec(), '-n', str(n), sys.executable, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors='replace',
        cwd=ROOT,
        env=mpi_environment(env),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise TimeoutError(f'{argv} on {n} ranks ran over {timeout} s:\n{output}') from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)
