"""A first run prints its own lines and nothing else: no deprecation, no notice of a library."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

from dat_ds.commands import without_settled_warnings
from tests.integration import tiny_run
from tests.integration.silence import unexpected
from tests.settings import without_launcher

# Each time, not once for each place, and also what Python hides in modules by default.
STRICT = "always::FutureWarning,always::UserWarning,always::RuntimeWarning,always::ResourceWarning"

OWN_LOOPS = """
import torch
import dat_ds
from tests.distributed import tiny

for stage in (3, 2, 1, 0):
    data = torch.utils.data.TensorDataset(*tiny.images(12))
    engine, optimizer, loader, scheduler = dat_ds.initialize(
        model=tiny.cnn(), config=tiny.config(stage), training_data=data
    )
    for x, y in loader:
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
    engine.close()
"""


def printed(*arguments: str) -> str:
    """What a fresh process prints, to either stream, where it ends well."""
    environment = {
        **without_launcher(),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tiny_run.ROOT),
        "PYTHONWARNINGS": STRICT,
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_first_command_of_the_readme_prints_its_own_lines_alone(tmp_path: Path) -> None:
    values = tiny_run.config(tmp_path / "run", schedule={"epochs": 1, "max_steps": 4})
    values["dat"]["evaluation"]["natural_twin"] = True
    config = tiny_run.write(tmp_path / "config.json", values)
    recipe = tiny_run.ROOT / "recipes" / "train_vit.py"
    launcher = ("-m", "deepspeed.launcher.runner", "--quiet")
    output = printed(*launcher, str(recipe), "--deepspeed_config", str(config))
    assert "Record: " in output
    assert unexpected(output) == []


def test_a_loop_of_ones_own_prints_nothing() -> None:
    assert printed("-c", OWN_LOOPS) == ""


def test_a_foreign_line_is_unexpected() -> None:
    foreign = "x.py:3: FutureWarning: `torch.distributed.all_gather_into_tensor` is deprecated."
    assert unexpected(f"Note: a\n\n{foreign}\nRecord: r/record.json\n") == [foreign]


def test_only_settled_warnings_of_other_libraries_are_hidden_and_only_inside() -> None:
    settled = (
        "`torch.distributed.all_gather_into_tensor` is deprecated. Please use "
        "`torch.distributed.all_gather_single` instead.",
        FutureWarning,
        "torch/distributed/c10d_logger.py",
        83,
        "torch.distributed.c10d_logger",
    )
    others = [
        (settled[0].replace("all_gather_into", "gather_into"), *settled[1:]),
        (settled[0], UserWarning, *settled[2:]),
        (*settled[:4], "users.module"),
    ]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with without_settled_warnings():
            for warning in (settled, *others):
                warnings.warn_explicit(*warning)
        assert [str(w.message) for w in shown] == [warning[0] for warning in others]
        warnings.warn_explicit(*settled)
        assert len(shown) == len(others) + 1
