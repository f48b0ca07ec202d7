"""Evaluating the model that a run left, on one or many ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat_ds.assembly import build_data_of, evaluate_model
from dat_ds.config import load_config
from dat_ds.engine.launch import setup_ranks
from dat_ds.errors import CheckpointError
from dat_ds.evaluation import describe
from dat_ds.files import write_json
from dat_ds.models import load
from dat_ds.training.run import describe_outcome, task_of_export

logger = logging.getLogger("dat_ds")


def evaluate_run(
    folder: Path, overrides: Sequence[str] = (), *, imports: Sequence[str] = ()
) -> dict[str, Any]:
    """Evaluate the best model of a run and write ``evaluation.json`` into its folder.

    Args:
        folder: Folder of a run.
        overrides: ``"dotted.key=value"`` over the run's own config, such as
            ``'dat.evaluation.attacks=["pgd-100-10"]'``.
        imports: As for :func:`dat_ds.load_config`.

    Returns:
        The record.

    Raises:
        UserError: For a folder that holds no run, or a mistake in the overrides; on all ranks.
    """
    ranks = setup_ranks()
    started = time.perf_counter()
    with ranks.together():
        config = folder / "config.json"
        if not config.exists():
            raise CheckpointError(f"{str(folder)!r} is not the folder of a run: no config.json.")
        run = load_config(config, overrides=overrides, imports=imports, here=False)
        splits = build_data_of(run)
        model = load(folder, map_location=ranks.device)
        task = task_of_export(run, folder, ranks)
    outcome = evaluate_model(model, splits.test, run, ranks, task)
    seconds = {"evaluate": time.perf_counter() - started}
    record = {**describe_outcome(outcome, run, ranks), "seconds": seconds}
    with ranks.together():
        if ranks.is_main:
            write_json(folder / "evaluation.json", record)
            for name, value in outcome.robust_acc.items():
                logger.info("%s: %.1f%%", name, 100 * value)
            logger.info("%s", describe(record, None))
            logger.info("Record: %s", folder / "evaluation.json")
    return record
