"""The examples of docs/howto/own_methods.md train on two ranks, each under several ZeRO stages."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.harness import run_ranks
from tests.docs.pages import DOCS, blocks
from tests.docs.test_blocks import _SHELL

STAGES, STEPS, RANKS = (0, 2, 3), 3, 2
EXAMPLES = {
    file: content
    for _, block in blocks(DOCS / "howto" / "own_methods.md", "bash")
    for file, content, _ in _SHELL.findall(block)
    if file.endswith(".py")
}
SECTIONS: dict[str, dict[str, Any]] = {
    "my_attack": {"attack": {"name": "my_attack:Decaying", "steps": 2}},
    "my_objective": {"objective": {"name": "my_objective:Margin", "margin": 0.5}},
    "my_codec": {"compression": {"name": "my_codec:Bfloat16"}},
}
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "attack": (
        {"name": "my_attack:Decaying", "steps": 0, "restarts": 2, "stpes": 1},
        [
            "dat.attack.restarts=2 is not a setting of the attack 'my_attack:Decaying': remove it.",
            "Unknown key in the run config: dat.attack.stpes (did you mean 'steps'?).",
            "dat.attack.steps=0 is not valid: write a number of at least 1.",
        ],
    ),
    "objective": (
        {"name": "my_objective:Margin", "margin": "wide", "beta": 6},
        [
            "dat.objective.beta=6 is not a setting of the objective 'my_objective:Margin'",
            "dat.objective.margin='wide' must be a finite number.",
        ],
    ),
    "compression": (
        {"name": "my_codec:Bfloat16", "bucket_mb": 0, "error_feedback": False, "levels": 3},
        [
            "dat.compression.levels=3 is not a setting of the codec 'my_codec:Bfloat16', but of",
            "dat.compression.bucket_mb=0.0 is not valid: write a number above 0.",
            "dat.compression.error_feedback=false: 'bfloat16' is biased",
        ],
    ),
    "data": (
        {"name": "my_data:Stripes", "count": 1, "path": "here"},
        [
            "dat.data.path='here' is not a setting of the dataset 'my_data:Stripes'",
            "dat.data.count=1 is not valid: write a number of at least 2.",
        ],
    ),
}


def write_examples(folder: str) -> None:
    """Put the examples where this process finds them, and let configs name them."""
    import dat_ds

    for file, content in EXAMPLES.items():
        (Path(folder) / file).write_text(content, encoding="utf-8")
    sys.path.append(folder)
    for file in EXAMPLES:
        dat_ds.import_methods(file.removesuffix(".py"))


@pytest.fixture
def examples(tmp_path: Path):
    write_examples(str(tmp_path))
    yield
    sys.path.remove(str(tmp_path))
    for file in EXAMPLES:
        sys.modules.pop(file.removesuffix(".py"))


def advanced(stage: int, dat: dict[str, Any]) -> dict[str, Any]:
    """A few steps; what was lost, sent and recorded."""
    import dat_ds

    config = tiny.config(stage, dat={"attack": {"steps": 1}, **dat})
    engine, *_ = dat_ds.initialize(model=tiny.vit(), config=config)
    losses = []
    for step in range(STEPS):
        x, y = tiny.images(4, seed=10 * step + engine.ranks.rank)
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    found = {
        "losses": losses,
        "bytes": sum(engine.metrics["bytes_sent"].values()),
        "config": engine.run.to_dict()["dat"],
    }
    engine.close()
    return found


def train_all(folder: str) -> dict[str, Any]:
    """Every example under every stage, and a whole run of all of them, on data of its own."""
    from dat_ds.config import load_config
    from dat_ds.training.run import train

    with tempfile.TemporaryDirectory() as own:
        write_examples(own)
        found: dict[str, Any] = {
            f"{name} {stage}": advanced(stage, dat)
            for stage in STAGES
            for name, dat in {"plain": {}, **SECTIONS}.items()
        }
        dat: dict[str, Any] = {
            "data": {"name": "my_data:Stripes", "count": 24},
            "model": {"name": "vit_tiny_patch16_224", "patch_size": 4, "depth": 1}
            | {"embed_dim": 16, "num_heads": 2},
            "evaluation": {"attacks": ["pgd-2", "my_attack:Decaying"], "pictures": 0},
            "schedule": {"max_steps": 2},
            "output_dir": folder,
            **{key: value for section in SECTIONS.values() for key, value in section.items()},
        }
        found["record"] = train(load_config(tiny.config(2, dat=dat)))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(train_all, RANKS, str(tmp_path_factory.mktemp("own") / "run"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SECTIONS)
def test_every_example_trains_on_two_ranks(outcomes, name, stage):
    first, second = (outcome[f"{name} {stage}"] for outcome in outcomes)
    plain = outcomes[0][f"plain {stage}"]
    assert len(first["losses"]) == len(second["losses"]) == STEPS
    assert all(loss == loss for loss in first["losses"] + second["losses"])
    ((section, keys),) = SECTIONS[name].items()
    assert first["config"][section].items() >= keys.items()
    if name == "my_codec":
        # The first loss comes before any gradient has travelled; later ones are close, not equal.
        assert first["losses"][0] == plain["losses"][0]
        assert first["losses"][1:] != plain["losses"][1:]
        assert first["losses"] == pytest.approx(plain["losses"], abs=0.02)
        assert first["bytes"] < plain["bytes"]
    else:
        assert first["losses"] != plain["losses"]


def test_a_run_of_all_examples_is_recorded_and_evaluated(outcomes):
    record, of_second = (outcome["record"] for outcome in outcomes)
    assert record["ranks"] == RANKS
    assert set(record["robust_acc"]) == {"pgd-2", "my_attack:Decaying"}
    assert record["outcomes"]["my_attack:Decaying"] == of_second["outcomes"]["my_attack:Decaying"]
    assert 0 < record["largest_perturbation"]["my_attack:Decaying"] <= 0.1 + 1e-6
    assert tuple(record["class_names"]) == ("horizontal", "vertical")
    dat = record["config"]["dat"]
    assert dat["data"]["name"] == "my_data:Stripes"
    assert dat["data"]["count"] == 24
    for section, keys in [item for s in SECTIONS.values() for item in s.items()]:
        assert dat[section].items() >= keys.items()
    assert dat["compression"]["error_feedback"] is True


@pytest.mark.parametrize("section", BAD)
def test_options_of_the_examples_are_checked_like_built_in_ones(examples, section):
    from dat_ds.config import load_config
    from dat_ds.errors import ConfigError

    values, messages = BAD[section]
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.config(0, dat={section: values}))
    found = str(caught.value).split("\n")
    assert len(found) == len(messages), found
    for line, message in zip(found, messages, strict=True):
        assert line.startswith(message)


def test_a_codec_of_ones_own_keeps_its_promises(examples):
    import torch

    from dat_ds.compression import build_codec

    codec = build_codec("my_codec:Bfloat16")
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(3)
    payload = codec.encode(values)
    assert codec.num_bytes(payload) == codec.bytes_of(1000) == 2000
    lost = (codec.decode(payload) - values).square().sum() / values.square().sum()
    assert 0 < lost <= codec.variance_bound(1000)
    values[7] = float("nan")
    assert codec.decode(codec.encode(values)).isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("file", EXAMPLES)
def test_an_example_has_fewer_than_20_lines_of_code(file):
    lines = EXAMPLES[file].split("@dataclass", 1)[1].splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith('"""')]
    assert 5 < len(code) < 20


def test_the_page_has_one_example_of_each_kind():
    assert list(EXAMPLES) == ["my_attack.py", "my_objective.py", "my_codec.py", "my_data.py"]
