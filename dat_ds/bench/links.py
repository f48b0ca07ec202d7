"""Time per optimizer step over links of a given speed, by what is sent over them.

Every rank is a host of its own in a :class:`dat_ds.bench.network.ShapedNetwork`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dat_ds.bench.network import ShapedNetwork
from dat_ds.bench.records import write_record
from dat_ds.bench.timing import check_repetitions
from dat_ds.config import load_config
from dat_ds.errors import ConfigError

_PORT = 29_511
_WARM_UP = 2
_PROBE_BYTES = 4 * 2**20


def bench_links(
    config: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    ranks: int,
    mbit: float,
    repetitions: int,
    output: str | None = None,
) -> str:
    """Time the variants of a run one after another, on hosts with shaped links.

    Args:
        config: A run config; its data gives the image size, the images themselves are random.
        variants: Keys to lay over ``config``, by name: ``{"dat.compression": {"name": "int8"}}``.
            The first is what the others are compared with, and is timed again at the end, which
            shows how far the machine drifted.
        ranks: Hosts, of one rank each.
        mbit: Speed of every link in megabits a second, in each direction.
        repetitions: Timed steps of each variant.
        output: JSON file for the numbers.

    Returns:
        A markdown table of medians.

    Raises:
        ConfigError: Fewer than 5 repetitions, no right to make hosts, or a rank that failed.
    """
    check_repetitions(repetitions)
    runs = {name: _laid_over(config, overrides) for name, overrides in variants.items()}
    first = next(iter(runs))
    runs[f"{first}, again"] = runs[first]
    for run in runs.values():
        load_config(run)  # every mistake is told before the first host is made
    with tempfile.TemporaryDirectory() as folder, ShapedNetwork(ranks, mbit) as network:
        plan = Path(folder) / "plan.json"
        result = Path(folder) / "result.json"
        plan.write_text(json.dumps({"runs": runs, "repetitions": repetitions}), encoding="utf-8")
        _run_on_hosts(network, [str(plan), str(result)])
        measured = json.loads(result.read_text(encoding="utf-8"))
    measured |= {"ranks": ranks, "mbit": mbit, "config": dict(config)}
    write_record(output, measured, torch.device("cpu"))
    return _describe(measured, first)


def _laid_over(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with each dotted key replaced whole; None removes it."""
    run: dict[str, Any] = json.loads(json.dumps(config))
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node = run
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return run


def _run_on_hosts(network: ShapedNetwork, arguments: Sequence[str]) -> None:
    """Run this module on every host; the first rank that fails ends the others."""
    workers: list[subprocess.Popen[str]] = []
    for rank in range(network.hosts):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(network.hosts),
            "LOCAL_RANK": "0",
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": network.address(0),
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": network.interface(rank),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        words = network.command(rank, [sys.executable, "-m", __name__, *arguments])
        workers.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break
            time.sleep(0.2)
        failed = [(rank, w) for rank, w in enumerate(workers) if w.poll()]
    finally:
        for worker in workers:
            worker.kill()
    if failed:
        rank, worker = failed[0]
        said = worker.communicate()[1].strip().splitlines()
        raise ConfigError(f"Rank {rank} failed: {said[-1] if said else 'it said nothing'}")


def _time_variants(plan: Path, result: Path) -> None:
    """Rank's part of :func:`bench_links`, on its host."""
    from dat_ds.engine.bench import prepared_engine
    from dat_ds.engine.distributed import setup_ranks

    planned = json.loads(plan.read_text(encoding="utf-8"))
    ranks = setup_ranks()
    measured: dict[str, Any] = {"measured_mbit": _measure_link(ranks.count), "variants": {}}
    for name, config in planned["runs"].items():
        engine, _, x, y = prepared_engine(load_config(config))
        rounds = []
        for repetition in range(-_WARM_UP, planned["repetitions"]):
            ranks.barrier()
            start = time.perf_counter()
            engine.backward(engine(x, y))
            engine.step()
            ranks.barrier()  # a step lasts until the slowest rank has done it
            if repetition >= 0:
                rounds.append(time.perf_counter() - start)
        measured["variants"][name] = {
            "seconds": rounds,
            "bytes_sent": engine.metrics["bytes_sent"],
            "seconds_attack": engine.metrics["seconds_attack"],
        }
        measured["num_parameters"] = sum(
            getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()
        )
        engine.close()
    if ranks.is_main:
        result.write_text(json.dumps(measured), encoding="utf-8")


def _measure_link(ranks: int) -> float:
    """Megabits a second that each link carries in an all-reduce, in each direction."""
    payload = torch.zeros(_PROBE_BYTES // 4)
    torch.distributed.all_reduce(payload)
    start = time.perf_counter()
    torch.distributed.all_reduce(payload)
    sent = 2 * _PROBE_BYTES * (ranks - 1) / ranks
    return 8e-6 * sent / (time.perf_counter() - start)


def _describe(measured: Mapping[str, Any], first: str) -> str:
    medians = {n: statistics.median(v["seconds"]) for n, v in measured["variants"].items()}
    sent = {n: sum(v["bytes_sent"].values()) for n, v in measured["variants"].items()}
    lines = [
        f"{measured['ranks']} hosts of one rank, links of {measured['mbit']:g} Mbit/s (measured: "
        f"{measured['measured_mbit']:.0f}), {measured['num_parameters'] / 1e6:.1f}M parameters, "
        f"medians of {len(measured['variants'][first]['seconds'])} steps",
        "",
        "| what is sent | ms per step | speedup | MB per rank and step | share of bytes |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {1000 * medians[name]:.0f} | {medians[first] / medians[name]:.2f} | "
        f"{sent[name] / 1e6:.3f} | {sent[name] / sent[first]:.4f} |"
        for name in medians
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    from dat_ds.cli.main import end_process

    _time_variants(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
