"""A server of processes that have imported already what tests import, which takes seconds."""

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "dat_ds.training.run",
        "dat_ds.cli.main",
        "sklearn.datasets",
        "timm",
        "torchvision",
        "transformers.models.vit.modeling_vit",
        # What DeepSpeed and a run's end import only then, for seconds.
        "deepspeed.runtime.zero.stage3",
        "matplotlib.backends.backend_agg",
        "networkx",
        "torch._dynamo.backends.debugging",
        "torch._inductor.compile_fx",
        "torch.utils.tensorboard",
    ]
)
