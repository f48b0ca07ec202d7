"""Claims about a user's own methods: chosen by place, and imported only where that is asked for."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import dat_ds
from dat_ds.attacks import SampleGenerator, ThreatModel, build_attack, parse_evaluation_attack
from dat_ds.config import attack_of, load_config
from dat_ds.errors import ConfigError
from dat_ds.evaluation import evaluate
from dat_ds.evaluation.ensemble import EnsembleEvaluation
from dat_ds.evaluation.samples import Journal
from dat_ds.ranks import Ranks

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


@dataclass(frozen=True, kw_only=True)
class Astray(Attack):
    """Does what no attack may do."""

    name: ClassVar[str] = "astray"
    how: str = "far"

    def perturb(self, model, x, y, generator, gradient, **carried):
        model(x)
        if self.how == "far":
            return (x + 3 * self.ball.eps).clamp(0, 1)
        if self.how == "bright":
            return x + self.ball.eps
        return x / 0 * 0 if self.how == "nan" else x[:, :, 1:]


@dataclass(frozen=True, kw_only=True)
class Bright(Astray):
    how: str = "bright"


@dataclass(frozen=True, kw_only=True)
class Undefined(Astray):
    how: str = "nan"


@dataclass(frozen=True, kw_only=True)
class Cut(Astray):
    how: str = "cut"


class Undecorated(Brighter):
    share: float = 0.5


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
    assert "dat.attack.steps=3 is not a setting of the attack" in str(caught.value)


@pytest.mark.parametrize("name", ["NOT_AN_ATTACK", "Missing", "Path"])
def test_what_is_no_attack_is_refused(module, name):
    with pytest.raises(ConfigError, match=f"has no Attack by the name of '{name}'"):
        load_config(config({"name": f"{module}:{name}"}), imports=[module])


def test_a_class_whose_fields_would_not_count_is_refused(module):
    with pytest.raises(
        ConfigError, match=r"fields, which count only under @dataclass\(frozen=True"
    ):
        load_config(config({"name": f"{module}:Undecorated"}), imports=[module])


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


IMAGES = torch.full((4, 3, 4, 4), 0.5)
IMAGES[2] = 0.99
LABELS = torch.zeros(4, dtype=torch.int64)
REMEDY = "End it with threat.project(x_adv, x) (in a class: self.ball.project)."
MISTAKES = {
    "Astray": f"left the ball: image 0 of the batch lies 0.3 from its original in linf, with "
    f"eps=0.1. {REMEDY}",
    "Bright": "left the pixel range [0, 1]: image 2 of the batch spans [1.09, 1.09], 0.09 outside. "
    f"{REMEDY}",
    "Undefined": "returned NaN or infinite pixels in image 0 of the batch: look for a division by "
    "zero or a logarithm of zero, such as the norm of a gradient that is zero.",
    "Cut": "returned torch.float32 of shape (4, 3, 3, 4) for images of shape (4, 3, 4, 4): return "
    "adversarial images, floating point, of shape (4, 3, 4, 4).",
}


def trained(attack: str, model: torch.nn.Module) -> None:
    """One step of training."""
    run = config({"name": attack}) | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    run["dat"] = {"attack": {"name": attack}, "threat_model": {"eps": 0.1}}
    engine, *_ = dat_ds.initialize(model=model, config=run)
    try:
        engine(IMAGES, LABELS)
    finally:
        engine.close()


def evaluated(attack: str, model: torch.nn.Module) -> None:
    samples: Any = list(zip(IMAGES, LABELS, strict=True))
    evaluate(model, samples, ThreatModel("linf", 0.1), [attack])


def judged(attack: str, model: torch.nn.Module) -> None:
    """As one of an ensemble."""
    with tempfile.TemporaryDirectory() as folder:
        EnsembleEvaluation(
            model=model,
            data=list(zip(IMAGES, LABELS, strict=True)),
            threat=ThreatModel("linf", 0.1),
            attacks=[parse_evaluation_attack(attack)],
            indices=range(4),
            batch_size=32,
            seed=0,
            ranks=Ranks(rank=0, count=1, device=torch.device("cpu"), cpu_group=None),
            journal=Journal(Path(folder), 0),
        ).run()


def called(attack: str, model: torch.nn.Module) -> None:
    """In Python."""
    settings = {"name": attack, "threat_model": ThreatModel("linf", 0.1)}
    build_attack(settings)(model, IMAGES, LABELS)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("door", [trained, evaluated, judged, called])
def test_an_own_attack_that_goes_astray_is_named_at_the_first_step(module, mistake, door):
    dat_ds.import_methods(module)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    model[1].weight.data.zero_()
    model[1].bias.data.zero_()  # the first class everywhere, so that every image stands
    with pytest.raises(ConfigError) as caught:
        door(f"{module}:{mistake}", model)
    assert str(caught.value) == f"The attack '{module}:{mistake}' {MISTAKES[mistake]}"


def test_an_own_attack_cannot_be_recorded_as_a_graph(module):
    run = config({"name": f"{module}:Brighter"})
    run["dat"]["engine"] = {"cuda_graphs": True}
    with pytest.raises(
        ConfigError, match=rf"dat\.attack\.name='{module}:Brighter' leaves decisions"
    ):
        load_config(run, imports=[module])


def test_an_evaluation_attack_of_ones_own_needs_its_import(module):
    run = config({"name": "pgd"})
    run["dat"]["evaluation"] = {"attacks": ["pgd-5", f"{module}:Brighter"]}
    with pytest.raises(ConfigError) as caught:
        load_config(run)
    assert f"dat.evaluation.attacks[1]: '{module}:Brighter' names code of your own" in str(
        caught.value
    )
    assert load_config(run, imports=[module]).dat.evaluation.attacks[1] == f"{module}:Brighter"
