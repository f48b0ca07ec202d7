"""Ranks as CPU processes of this machine, on hosts of their own where links are to be shaped."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from dat_ds.bench.scaling.network import ShapedNetwork
from dat_ds.errors import ConfigError
from dat_ds.processes import free_port, rank_environment

_PORT = 29_511


def run_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    mbit: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run ``python -m module arguments`` as so many gloo ranks; the first that fails ends all.

    Args:
        module: Its main part joins the process group by :func:`dat_ds.initialize`, or otherwise.
        arguments: The same for every rank.
        ranks: Number of processes, of one thread each.
        mbit: Speed of every rank's link in megabits a second, in each direction; None leaves the
            ranks on this machine's loopback, and takes no rights.
        variables: Further variables of the environment of every rank.

    Raises:
        ConfigError: No right to make hosts, or a rank that failed.
    """
    with contextlib.ExitStack() as stack:
        network = None if mbit is None else stack.enter_context(ShapedNetwork(ranks, mbit))
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        workers: list[subprocess.Popen[bytes]] = []
        port = free_port() if network is None else _PORT
        words = [sys.executable, "-m", module, *arguments]
        try:
            for rank in range(ranks):
                address = "127.0.0.1" if network is None else network.address(0)
                environment = {
                    **os.environ,
                    **rank_environment(rank, ranks, port, address=address),
                    "GLOO_SOCKET_IFNAME": "lo" if network is None else network.interface(rank),
                    "OMP_NUM_THREADS": "1",
                    **(variables or {}),
                }
                command = words if network is None else network.command(rank, words)
                workers.append(
                    subprocess.Popen(
                        command, env=environment, stdout=subprocess.DEVNULL, stderr=said[rank]
                    )
                )
            while any(worker.poll() is None for worker in workers):
                if any(worker.poll() for worker in workers):
                    break
                time.sleep(0.2)
            failed = [rank for rank, worker in enumerate(workers) if worker.poll()]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if failed:
            said[failed[0]].seek(0)
            lines = said[failed[0]].read().strip().splitlines()
            last = lines[-1] if lines else "it said nothing"
            raise ConfigError(f"Rank {failed[0]} failed: {last}")
