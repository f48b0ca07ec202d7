"""Claims about optimizers in run configs: ours, DeepSpeed's and the client's."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

from dat_ds.config import (
    adapt_to_device,
    load_config,
    one_bit_name,
    one_bit_options,
    scale_learning_rate,
)
from dat_ds.config.deepspeed.keys import ONE_BIT_OPTIMIZERS, OPTIMIZER_DEFAULTS, adam_weight_decay
from dat_ds.optim import OPTIMIZERS
from tests.unit.config_helpers import ADAMW, deepspeed_config_module, one_bit, problems

pytestmark = pytest.mark.fast

# ---- ours


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_our_optimizers_defaults_are_written_out_and_the_users_values_kept(name):
    method = OPTIMIZERS[name]
    written = load_config({"dat": {"optimizer": {"name": name}}}).to_dict()["dat"]["optimizer"]
    assert written == method().to_dict()
    assert set(written) == {"name", *method.known_keys()}
    assert json.loads(json.dumps(written)) == written
    own = load_config({"dat": {"optimizer": {"name": name, "lr": 3.0}}}).dat.optimizer
    assert (own.lr, own.weight_decay) == (3.0, method().weight_decay)


def test_an_optimizer_of_ours_is_allowed_under_zero():
    for stage, allowed in [(0, None), (1, True), (3, True)]:
        config = {"zero_optimization": {"stage": stage}, "dat": {"optimizer": {"name": "sgd"}}}
        assert load_config(config).deepspeed.get("zero_allow_untested_optimizer") is allowed


# ---- those that DeepSpeed removed


@pytest.mark.parametrize("kind", ONE_BIT_OPTIMIZERS)
def test_deepspeeds_removed_optimizers_are_ours_with_its_defaults_and_a_note(kind):
    name, defaults = ONE_BIT_OPTIMIZERS[kind]
    run = load_config({**one_bit(kind, lr=0.5), "gradient_clipping": 0})
    assert run.deepspeed["optimizer"]["params"] == {**defaults, "lr": 0.5}
    assert one_bit_name(run.deepspeed) == name
    assert set(one_bit_options(run.deepspeed)) < set(OPTIMIZERS[name].known_keys())
    assert run.notes == (
        f"optimizer.type={kind!r} is dat_ds's own {name!r}: DeepSpeed removed its optimizer in "
        "0.19.7",
    )


def test_what_is_not_used_of_their_parameters_and_local_clipping_are_said():
    run = load_config(one_bit("OneBitAdam", cuda_aware=True, comm_backend_name="mpi"))
    _, unused, clipping = run.notes
    assert unused == (
        "optimizer.params.cuda_aware and comm_backend_name are not used: collectives are those of "
        "torch.distributed"
    )
    assert clipping == (
        "gradient_clipping=1.0 acts on each rank's own gradient where no gradient is averaged: "
        "once the variance is frozen"
    )
    ours_alone = load_config({"dat": {"optimizer": {"name": "one_bit_lamb"}}})
    assert ours_alone.notes == (clipping,)


@pytest.mark.parametrize("written", ["auto", None])
def test_an_automatic_freeze_is_null_in_the_resolved_config(written):
    run = load_config(one_bit("OneBitAdam", freeze_step=written))
    assert run.deepspeed["optimizer"]["params"]["freeze_step"] is None
    assert load_config(run.to_dict()) == run


# ---- the client's


def test_a_client_optimizer_scales_its_own_learning_rate():
    config = {"dat": {"schedule": {"scaling": "linear", "base_batch": 256}}}
    assert problems(config, client_optimizer=True) == [
        "dat.schedule.scaling='linear' with initialize(optimizer=...): scale its own lr instead."
    ]


def test_a_client_optimizer_stands_in_for_the_configs_and_excludes_it():
    assert load_config({}, client_optimizer=True).dat.optimizer is None
    assert problems(ADAMW, client_optimizer=True) == [
        "'optimizer' and initialize(optimizer=...) are given together: keep one of them."
    ]


# ---- learning rate


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_the_learning_rate_is_scaled_to_the_global_batch_in_either_section(scaling, factor):
    schedule = {"scaling": scaling, "base_batch": 256}
    run = load_config({"dat": {"optimizer": {"name": "lamb", "lr": 0.5}, "schedule": schedule}})
    scaled, words = scale_learning_rate(run, 1024)
    assert scaled.dat.optimizer.lr == 0.5 * factor
    assert words == (
        f"Learning rate {0.5 * factor:g} = 0.5 x {factor:g}, scaled ({scaling}) from a global "
        "batch of 256 to 1024."
    )
    params = {"lr": 0.5, "muon_lr": 3.0, "momentum": 0.9}
    config = {"optimizer": {"type": "Muon", "params": params}, "dat": {"schedule": schedule}}
    run = load_config(config)
    scaled, _ = scale_learning_rate(run, 1024)
    expected = {"lr": 0.5 * factor, "muon_lr": 3.0 * factor, "momentum": 0.9}
    assert scaled.deepspeed["optimizer"]["params"] == expected
    assert run.deepspeed["optimizer"]["params"] == params, "what is saved is what was written"


def test_without_scaling_the_learning_rate_is_what_was_written():
    run = load_config(ADAMW)
    assert scale_learning_rate(run, 1024) == (run, "")


# ---- devices


def test_on_a_gpu_nothing_is_adapted():
    run = load_config(ADAMW)
    assert adapt_to_device(run, "cuda") is run


def test_on_a_cpu_torchs_adam_is_chosen_and_said():
    run = load_config(ADAMW)
    adapted = adapt_to_device(run, "cpu")
    assert adapted.deepspeed["optimizer"]["params"]["torch_adam"] is True
    assert adapted.deepspeed["optimizer"]["params"]["weight_decay"] == 0.0  # as on a GPU
    assert adapted.notes == (
        "optimizer.params.torch_adam=true: on a CPU DeepSpeed's is compiled first",
    )
    assert "torch_adam" not in run.deepspeed["optimizer"]["params"]
    assert adapt_to_device(adapted, "cpu") == adapted


def test_on_a_cpu_an_offloaded_optimizer_needs_no_compilation_either():
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "dat": {"optimizer": {"name": "adamw"}},
    }
    adapted = adapt_to_device(load_config(config), "cpu")
    assert adapted.deepspeed["zero_force_ds_cpu_optimizer"] is False
    assert adapted.notes == (
        "zero_force_ds_cpu_optimizer=false: offloaded states are updated by torch",
    )


def test_what_the_user_chose_for_the_cpu_is_kept_without_a_note():
    config = {"optimizer": {"type": "Adam", "params": {"torch_adam": False}}}
    run = adapt_to_device(load_config(config), "cpu")
    assert run.deepspeed["optimizer"]["params"]["torch_adam"] is False
    assert run.notes == ()
    sgd = load_config({"optimizer": {"type": "SGD"}})
    assert adapt_to_device(sgd, "cpu") == sgd


# ---- the defaults are those of the classes that run


def default_of(optimizer: Any, name: str) -> Any:
    return inspect.signature(optimizer).parameters[name].default


def implementations() -> list[tuple[str, dict[str, Any], Any]]:
    """What DeepSpeed builds for a name and its parameters."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    return [
        ("adam", {}, FusedAdam),
        ("adamw", {}, FusedAdam),
        ("adamw", {}, DeepSpeedCPUAdam),
        ("adam", {"torch_adam": True}, torch.optim.AdamW),
        ("adamw", {"torch_adam": True}, torch.optim.AdamW),
        ("adam", {"torch_adam": True, "adam_w_mode": False}, torch.optim.Adam),
        ("adamw", {"torch_adam": True, "adam_w_mode": False}, torch.optim.AdamW),
    ]


def test_our_adam_defaults_are_those_of_the_class_that_runs():
    for name, params, optimizer in implementations():
        assert adam_weight_decay(name, params) == default_of(optimizer, "weight_decay"), optimizer
        for key in ("lr", "betas", "eps"):
            default = OPTIMIZER_DEFAULTS[name][key]
            default = tuple(default) if isinstance(default, list) else default
            assert default == default_of(optimizer, key), (optimizer, key)


def test_our_sgd_defaults_are_torchs():
    for key, value in OPTIMIZER_DEFAULTS["sgd"].items():
        assert value == default_of(torch.optim.SGD, key), key


def test_adams_default_mode_is_deepspeeds():
    module = deepspeed_config_module()
    assert OPTIMIZER_DEFAULTS["adam"]["adam_w_mode"] is module.ADAM_W_MODE_DEFAULT
