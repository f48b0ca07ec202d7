"""Tables over many runs: their rows resolve, and their cells come from records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dat_ds.attacks import ATTACKS
from dat_ds.bench.tables import methods, speedup, speedups_robust
from dat_ds.bench.tables.runs import run_of
from dat_ds.errors import ConfigError
from dat_ds.evaluation import describe_training
from dat_ds.objectives import OBJECTIVES

CONFIGS = Path(__file__).parents[2] / "ds_configs"
ZERO2 = CONFIGS / "zero2.json"


def write_record(folder: Path, judges: tuple[str, ...], natural: float = 0.9) -> None:
    folder.mkdir(parents=True)
    record = {
        "natural_acc": natural,
        "robust_acc": dict.fromkeys(judges, natural / 2),
        "seconds": {"train": 12.3},
        "commit": "abc",
    }
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def test_every_method_that_learns_classes_has_a_row_that_resolves(tmp_path: Path) -> None:
    rows = methods.rows_of(tmp_path)
    runs = [run_of(ZERO2, changes) for changes in rows.values()]
    assert {run.dat.attack.name for run in runs} == set(ATTACKS)
    assert {run.dat.objective.name for run in runs} == {
        name for name, kind in OBJECTIVES.items() if kind.head == "classes"
    }


def test_a_run_that_is_there_is_not_trained_again(tmp_path: Path) -> None:
    write_record(tmp_path / "trades 0", methods.JUDGES)
    assert methods.compare_methods(ZERO2, tmp_path, ["trades"]).splitlines() == [
        "| training | clean % | pgd-20 % | apgd-ce-50 % | apgd-dlr-50 % | train s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| trades | 90.0 | 45.0 | 45.0 | 45.0 | 12 |",
    ]
    with pytest.raises(ConfigError, match=r"'tardes' is not valid. Write one of 'pgd', 'fgsm'"):
        methods.compare_methods(ZERO2, tmp_path, ["tardes"])
    with pytest.raises(ConfigError, match="--seeds 0 0: give at least one, each once"):
        methods.compare_methods(ZERO2, tmp_path, ["trades"], seeds=[0, 0])
    with pytest.raises(ConfigError, match=r"dat\.seed=-1"):
        methods.compare_methods(ZERO2, tmp_path, ["trades"], seeds=[0, -1])


def test_robustness_of_cheaper_passes_is_a_mean_over_seeds(tmp_path: Path) -> None:
    for row, changes in speedups_robust.rows_of_all().items():
        run_of(ZERO2, changes)
        for seed in speedups_robust.SEEDS:
            folder = tmp_path / f"{row} {seed}"
            write_record(folder, speedups_robust.JUDGES, natural=0.8 + seed / 10)
    output = tmp_path / "numbers.json"
    table = speedups_robust.compare_speedups(ZERO2, tmp_path, output=output).splitlines()
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["table"].splitlines() == table
    assert [run["natural_acc"] for run in written["rows"]["ViT, float32"]] == [0.8, 0.9, 1.0]
    assert {run["commit"] for run in written["rows"]["ViT, float32"]} == {"abc"}
    assert "| ViT, attack in bf16 | 90.0 +- 10.0 | 45.0 +- 5.0 | 45.0 +- 5.0 | 12 |" in table
    assert len(table) == 2 + 6 + 5


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_rows_of_a_step_resolve(on_gpu: bool) -> None:
    bench = speedup.ON_GPU if on_gpu else speedup.ON_CPU
    for network, rows in speedup.rows_of(bench.batch, on_gpu).items():
        model = bench.vit if network == "ViT" else bench.resnet
        for changes in rows.values():
            run = run_of(CONFIGS / bench.config, bench.changes(model, changes))
            assert run.dat.data.name == "synthetic"


def test_a_row_of_a_step_is_timed_or_says_that_it_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench_attack(run: Any, *, repetitions: int, output: str) -> str:
        if run.dat.engine.compile != "none":
            raise ConfigError("No compiler.")
        found: Mapping[str, Any] = {
            "median_seconds": {"engine step": 0.5},
            "images": 16,
            "over_parts": 1.0,
            "over_others": {"backward through DDP": 0.5},
            "peak_bytes": {"engine step": 2e6},
        }
        Path(output).write_text(json.dumps(found), encoding="utf-8")
        return "timed"

    monkeypatch.setattr(speedup, "bench_attack", bench_attack)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    table = speedup.attack_table(CONFIGS, tmp_path, repetitions=5).splitlines()
    assert "| ViT, PGD-3 | 500 | 32.0 | 1.000 | - | 2.00 | 2 |" in table
    assert "| ViT, compiled | refused, see above |  |  |  |  |  |" in table
    assert len({line.count("|") for line in table}) == 1
    assert (tmp_path / "vit_in_4_attacked_by_1.json").exists()


def test_the_mistakes_of_both_speedup_tables_are_told_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--repetitions 4: give at least 5"):
        speedup.attack_table(CONFIGS, tmp_path, repetitions=4)
    speedup.check_scaling(CONFIGS, ranks=[1, 2], mbit=[])
    with pytest.raises(ConfigError, match="--ranks 0: give at least 1"):
        speedup.check_scaling(CONFIGS, ranks=[0], mbit=[])
    with pytest.raises(ConfigError, match="--ranks: give at least one number"):
        speedup.check_scaling(CONFIGS, ranks=[], mbit=[10.0])


def test_every_row_has_words_for_its_training(tmp_path: Path) -> None:
    for changes in methods.rows_of(tmp_path).values():
        run = run_of(ZERO2, changes)
        words = describe_training(run.dat.to_dict())
        natural = run.dat.attack.name == "none"
        assert "natural" in words if natural else run.dat.attack.name in words
