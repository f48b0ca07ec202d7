"""Hosts with shaped links: what they need, and the table they give."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dat_ds.bench.links import _laid_over, bench_links
from dat_ds.bench.network import ShapedNetwork
from dat_ds.errors import ConfigError
from tests.integration import tiny_run

CAN_MAKE_HOSTS = os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))


def test_missing_tools_and_rights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="ip and tc not found: apt install iproute2"):
        ShapedNetwork(2, 100)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="run this command as root"):
        ShapedNetwork(2, 100)


def test_a_variant_replaces_whole_keys_and_leaves_the_config_alone() -> None:
    config = {"optimizer": {"type": "AdamW"}, "dat": {"seed": 1}}
    variant = {"optimizer": None, "dat.compression": {"name": "int8"}}
    assert _laid_over(config, variant) == {"dat": {"seed": 1, "compression": {"name": "int8"}}}
    assert config["optimizer"] == {"type": "AdamW"}


def test_few_repetitions_and_a_wrong_variant_are_refused_before_any_host_is_made() -> None:
    config = tiny_run.config(Path("run"))
    with pytest.raises(ConfigError, match="at least 5"):
        bench_links(config, {"float32": {}}, ranks=2, mbit=100, repetitions=4)
    variants = {"x": {"dat.compression": {"name": "int7"}}}
    with pytest.raises(ConfigError, match="int7"):
        bench_links(config, variants, ranks=2, mbit=100, repetitions=5)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root and iproute2")
def test_fewer_bytes_take_less_time_on_slow_links(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path / "run")
    config["zero_optimization"] = {"stage": 0}
    config["dat"]["model"] = {"depth": 2, "embed_dim": 256, "num_heads": 4}
    output = tmp_path / "links.json"
    variants = {"float32": {}, "int8": {"dat.compression": {"name": "int8"}}}
    table = bench_links(config, variants, ranks=2, mbit=20, repetitions=5, output=str(output))
    assert "| int8 |" in table
    measured = json.loads(output.read_text())
    assert 10 < measured["measured_mbit"] < 22
    medians = [sorted(v["seconds"])[2] for v in measured["variants"].values()]
    assert medians[0] > 2 * medians[1]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"dat{os.getpid() % 100_000}" not in left
