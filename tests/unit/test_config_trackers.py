"""``dat.logging.trackers``: valid values, missing packages, the former key."""

from __future__ import annotations

from typing import Any

import pytest

from dat_ds.config import load_config
from dat_ds.errors import ConfigError
from tests.distributed import tiny


def loaded(*, here: bool = True, sections: dict[str, Any] | None = None, **logs: Any) -> list[str]:
    config = tiny.config(0, dat={"logging": logs}, **(sections or {}))
    return load_config(config, here=here).dat.logging.trackers


def refused(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(**options)
    return str(caught.value)


def only(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Have these packages installed, of those that trackers need."""
    monkeypatch.setattr("dat_ds.config.trackers.is_installed", packages.__contains__)


def test_tensorboard_is_the_default_and_none_is_a_choice() -> None:
    assert loaded() == ["tensorboard"]
    assert loaded(trackers=[]) == []


@pytest.mark.parametrize("names", [["wand"], ["wandb", "wandb"]])
def test_other_names_and_names_twice_are_refused(names: list[str]) -> None:
    assert refused(trackers=names) == (
        f"dat.logging.trackers={names!r} is not valid: write a list of 'tensorboard', 'wandb', "
        "'trackio', each once."
    )


def test_a_missing_package_is_refused_where_the_run_is_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, "tensorboard")
    assert refused(trackers=["tensorboard", "trackio"]) == (
        "dat.logging.trackers names 'trackio', but the package 'trackio' is not installed: pip "
        'install trackio, or write dat.logging.trackers=["tensorboard"].'
    )
    assert loaded(trackers=["trackio"], here=False) == ["trackio"]


def test_wandb_is_told_by_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "wandb")
    monkeypatch.setattr("dat_ds.config.deepspeed.sections.is_installed", lambda module: True)
    message = refused(trackers=["wandb"], sections={"wandb": {"enabled": True}})
    assert message == (
        "dat.logging.trackers names 'wandb', and wandb.enabled=true is DeepSpeed's own monitor for "
        "it: remove the section 'wandb' (dat.logging.project names the project, WANDB_ENTITY the "
        "team), or write dat.logging.trackers=[]."
    )
    assert loaded(trackers=["wandb"], sections={"wandb": {"enabled": False}}) == ["wandb"]


@pytest.mark.parametrize(("value", "now"), [(False, "[]"), (True, '["tensorboard"]')])
def test_the_former_key_is_refused_with_what_to_write(value: bool, now: str) -> None:
    assert refused(tensorboard=value) == (
        f"dat.logging.tensorboard={str(value).lower()} is dat.logging.trackers={now} now: write "
        "that."
    )


@pytest.mark.parametrize(("value", "now"), [(False, []), (True, ["tensorboard"])])
def test_a_section_as_0_1_wrote_it_is_translated(value: bool, now: list[str]) -> None:
    assert loaded(every_steps=10, progress=True, tensorboard=value) == now
