"""Claims about reading run configs: files, precedence, the same after a round trip."""

from __future__ import annotations

import copy
import json
import pickle
from typing import get_args

import pytest

from dat_ds.attacks import ATTACKS, INNER_LOSSES, NORMS
from dat_ds.compression import CODECS, COMPRESSIONS
from dat_ds.config import Length, load_config, schema
from dat_ds.errors import ConfigError
from dat_ds.method import name_of
from dat_ds.optim import OPTIMIZERS
from tests.settings import TABLES
from tests.unit.config_helpers import ADAMW, ours

pytestmark = pytest.mark.fast


def test_a_table_knows_its_methods_by_their_own_names():
    for table in TABLES.values():
        assert {name: name_of(method) for name, method in table.items()} == {n: n for n in table}
    assert {"free", "none"} < set(ATTACKS)
    assert tuple(COMPRESSIONS) == ("none", *CODECS)


def test_the_words_in_the_schema_are_those_that_can_be_built():
    assert get_args(schema.Norm) == NORMS
    losses = {loss for attack in ATTACKS.values() for loss in attack.losses}
    assert losses == {*INNER_LOSSES, "dlr-targeted"}
    for method in OPTIMIZERS.values():
        assert ("preset" in method.known_keys()) == bool(method.presets)
        for preset in method.presets:
            load_config({"dat": {"optimizer": {"name": method.name, "preset": preset}}})


# ---- files


def test_a_file_is_read_like_its_content(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(ours(attack={"steps": 7})), encoding="utf-8")
    assert load_config(path) == load_config(str(path)) == load_config(ours(attack={"steps": 7}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b" 2}', r"run\.json, line 2, column 6: not valid JSON \(Expecting ':'"),
        ("[1]", r"run\.json: the run config must be a JSON object\."),
        (
            '{"dat": {"seed": 1, "seed": 2}}',
            r"Keys given twice in the run config: seed\.",
        ),
    ],
)
def test_a_broken_file_says_where(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"Cannot read the run config '.*nothing\.json': .*No such"
    ):
        load_config(tmp_path / "nothing.json")


# ---- precedence and overrides


def test_precedence_is_defaults_then_json_then_overrides():
    defaults = ours(attack={"steps": 1, "restarts": 1, "loss": "ce"}, seed=1)
    del defaults["optimizer"]
    config = ours(attack={"steps": 2, "restarts": 2})
    run = load_config(config, defaults=defaults, overrides=["dat.attack.steps=3"])
    assert run.dat.attack.steps == 3
    assert run.dat.attack.restarts == 2
    assert run.dat.seed == 1
    assert load_config(config).dat.seed == 0


def test_overrides_are_json_or_else_text_and_the_last_one_wins():
    run = load_config(
        ADAMW,
        overrides=[
            "dat.threat_model.eps=4/255",
            "dat.attack.random_start=false",
            'dat.model.options={"a": [1]}',
            "dat.output_dir=a=b",
            "train_batch_size=32",
            "dat.seed=1",
            "dat.seed=2",
        ],
    )
    assert run.dat.threat_model.eps == 4 / 255
    assert run.dat.attack.random_start is False
    assert run.dat.model.options == {"a": [1]}
    assert run.dat.output_dir == "a=b"
    assert run.deepspeed["train_batch_size"] == 32
    assert run.dat.seed == 2


@pytest.mark.parametrize("override", ["dat.seed", "=3", "dat..seed=3", ".seed=3"])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match=r"is not 'dotted\.key=value', as in dat\.attack\.steps"):
        load_config(ADAMW, overrides=[override])


def test_an_override_below_a_value_names_what_is_no_section():
    with pytest.raises(ConfigError, match=r"--set 'dat\.seed\.x=1': dat\.seed is not a section"):
        load_config(ours(seed=3), overrides=["dat.seed.x=1"])


def test_loading_leaves_the_given_config_alone():
    config = {**ours(attack={"steps": 3}), "zero_optimization": {"stage": 2}}
    before = copy.deepcopy(config)
    load_config(config, overrides=["dat.attack.steps=5", "zero_optimization.stage=1"])
    assert config == before


def test_a_recipes_options_go_with_its_model_alone() -> None:
    defaults = {"dat": {"model": {"name": "vit_tiny_patch16_224", "patch_size": 4}}}
    same = load_config(ours(), defaults=defaults, overrides=["dat.model.depth=2"]).dat.model
    assert (same.name, same.patch_size, same.depth) == ("vit_tiny_patch16_224", 4, 2)
    other = load_config(ours(), defaults=defaults, overrides=["dat.model.name=resnet18"])
    assert (other.dat.model.name, other.dat.model.patch_size) == ("resnet18", None)


# ---- round trips


ROUND_TRIPS = [
    ours(),
    ours(attack={"name": "fgsm", "random_start": True}),
    ours(attack={"name": "none"}),
    ours(threat_model={"eps": 0}),
    ours(threat_model={"eps": "0/255"}, attack={"name": "fgsm"}),
    ours(threat_model={"norm": "l2", "eps": "128/255"}, objective={"name": "dat"}),
    ours(model={"mean": [0.5], "std": [0.2], "options": {"a": {"b": 1}}}, output_dir="x"),
    {"dat": {"optimizer": {"name": "sgd"}}, "zero_optimization": True},
    {"dat": {"optimizer": {"name": "lamb"}}},
    {"dat": {"optimizer": {"name": "lars", "preset": "paper", "upper": 5}}},
    {**ADAMW, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    {**ADAMW, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_a_saved_config_loads_as_the_same_run(config):
    run = load_config(config)
    through_json = json.loads(json.dumps(run.to_dict()))
    assert load_config(through_json) == run
    assert load_config(through_json).to_dict() == run.to_dict() == through_json
    assert load_config(run) is run


@pytest.mark.parametrize("text", ["8/255", 0.03, "0.03", 1])
def test_a_length_prints_as_it_was_written_also_after_copies(text):
    length = Length(text)
    copies = [length, Length(length), copy.deepcopy(length), pickle.loads(pickle.dumps(length))]
    assert {str(c) for c in copies} == {repr(length)} == {str(text)}
    assert {float(c) for c in copies} == {float(length)}
    assert isinstance(length, float)
