"""Claims about a user's own methods: chosen by place, and imported only where that is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dat_ds
from dat_ds.attacks import SampleGenerator
from dat_ds.config import attack_of, load_config
from dat_ds.errors import ConfigError

pytestmark = pytest.mark.fast
SOURCE = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dat_ds.attacks import Attack
from dat_ds.method import at_least

Path(__file__).with_suffix(".was_run").touch()


@dataclass(frozen=True, kw_only=True)
class Brighter(Attack):
    """Adds a constant, as no sensible attack does."""

    name: ClassVar[str] = "brighter"
    share: float = at_least(0, 1.0)
    """Of eps."""

    def perturb(self, model, x, y, generator, gradient, **carried):
        return self.ball.project(x + self.share * self.ball.eps, x)


NOT_AN_ATTACK = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module with an attack, not imported yet; every test has another one."""
    name = f"own_methods_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def config(attack: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "dat": {"attack": attack, "optimizer": {"name": "adamw"}},
    }


def test_a_config_alone_runs_no_code(module, tmp_path):
    with pytest.raises(ConfigError, match=rf"dat\.attack\.name='{module}:Brighter' names code of"):
        load_config(config({"name": f"{module}:Brighter"}))
    assert module not in sys.modules
    assert not (tmp_path / f"{module}.was_run").exists()


def test_a_module_that_happens_to_be_loaded_is_not_named_either():
    with pytest.raises(ConfigError, match="say --import collections as well"):
        load_config(config({"name": "collections:OrderedDict"}))


def test_an_imported_attack_is_chosen_checked_and_written_back(module):
    run = load_config(config({"name": f"{module}:Brighter", "share": 0.5}), imports=[module])
    assert run.dat.attack.share == 0.5
    assert run.to_dict()["dat"]["attack"]["name"] == f"{module}:Brighter"
    assert load_config(run.to_dict()) == run
    attack = attack_of(run.dat, run.dat.objective)
    x = torch.full((2, 3, 4, 4), 0.5)
    x_adv = attack(torch.nn.Identity(), x, torch.zeros(2), SampleGenerator(0, 0))
    torch.testing.assert_close(x_adv, x + 0.5 * 8 / 255)


def test_its_options_are_checked_like_those_of_every_method(module):
    dat_ds.import_methods(module)
    with pytest.raises(ConfigError) as caught:
        load_config(config({"name": f"{module}:Brighter", "share": -1, "steps": 3}))
    assert "dat.attack.share=-1.0 is not valid: write a number of at least 0." in str(caught.value)
    assert "dat.attack.steps=3 is no setting of the attack" in str(caught.value)


@pytest.mark.parametrize("name", ["NOT_AN_ATTACK", "Missing", "Path"])
def test_what_is_no_attack_is_refused(module, name):
    with pytest.raises(ConfigError, match=f"has no Attack by the name of '{name}'"):
        load_config(config({"name": f"{module}:{name}"}), imports=[module])


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="--import no_such_module: No module named"):
        load_config(config({}), imports=["no_such_module"])


def test_the_command_line_takes_modules(module, tmp_path, capsys):
    import json

    from dat_ds.cli.main import main

    file = tmp_path / "run.json"
    file.write_text(json.dumps(config({"name": f"{module}:Brighter"})), encoding="utf-8")
    assert main(["config", "--deepspeed_config", str(file)]) == 2
    assert f"--import {module}" in capsys.readouterr().err
    words = ["config", "--deepspeed_config", str(file), "--import", module]
    assert main(words) == 0
