"""Top-level keys that DeepSpeed 0.19.8 accepts, and its defaults that change results.

DeepSpeed ignores unknown top-level keys, a typo such as ``gradiant_clipping`` included, so we
refuse them. A test compares both tables with the installed DeepSpeed.
"""

from typing import Any

TOP_LEVEL_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler
    fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation
    memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel
    tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()  # noqa: SIM905
)

SCALAR_DEFAULTS: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "gradient_allreduce_op": "mean",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
}
"""Top-level defaults that change results. Since 0.19, gradients are clipped to norm 1.

``gradient_accumulation_steps`` follows from the two batch sizes where both are given.
"""

AUTOCAST_DEFAULTS: dict[str, Any] = {"dtype": "bfloat16"}
"""Of ``torch_autocast``, shown where it is enabled."""

FP16_DEFAULTS: dict[str, Any] = {
    "auto_cast": False,
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}
"""Dynamic loss scaling of ``fp16``, shown where it is enabled."""

OPTIMIZER_KEYS = ("type", "params", "legacy_fusion")
"""Keys of ``optimizer``, of which DeepSpeed passes over any other."""

OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "adam_w_mode": True},
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
}
"""Defaults of the optimizers that DeepSpeed names; :func:`adam_weight_decay` gives the rest."""


_ONE_BIT = {
    "lr": 1e-3,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "bias_correction": True,
    "eps_inside_sqrt": False,
    "amsgrad": False,
    "cuda_aware": False,
    "comm_backend_name": "nccl",
}
ONE_BIT_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "onebitadam": ("one_bit_adam", {**_ONE_BIT, "freeze_step": 100_000}),
    "onebitlamb": (
        "one_bit_lamb",
        {
            **_ONE_BIT,
            "freeze_step": 100_000,
            "max_coeff": 10.0,
            "min_coeff": 0.01,
            "coeff_beta": 0.9,
            "factor_max": 4.0,
            "factor_min": 0.5,
            "factor_threshold": 0.1,
            "adapt_vectors": True,  # no parameter of theirs, but what they did
        },
    ),
    "zerooneadam": (
        "zero_one_adam",
        {
            **_ONE_BIT,
            "var_freeze_step": 100_000,
            "var_update_scaler": 16,
            "local_step_scaler": 32_678,
            "local_step_clipper": 16,
        },
    ),
}
"""Optimizers that DeepSpeed removed in 0.19.7: ours by another name, and 0.19.6's defaults."""

NOT_READ = ("eps_inside_sqrt", "amsgrad", "cuda_aware", "comm_backend_name")
"""Parameters of theirs that ours have not."""


def adam_weight_decay(name: str, params: dict[str, Any]) -> float:
    """Default weight decay of DeepSpeed's Adam and AdamW, which depends on who implements them.

    Its own fused and CPU kernels default to 0, torch's AdamW (``torch_adam``) to 0.01.
    """
    decoupled = name == "adamw" or params.get("adam_w_mode", True)
    return 0.01 if params.get("torch_adam") and decoupled else 0.0
