"""Train a small residual network with BatchNorm to be robust.

deepspeed recipes/train_cnn.py --deepspeed_config ds_configs/zero2.json

The model below fits the digits (8 x 8 pixels) that ds_configs/ name; a config or --set that names
another model replaces it, options and all: --set dat.model.name=resnet50 --set dat.data.name=...
"""

from dat_ds.cli.main import run_script

MODEL = {
    "name": "resnet18",
    "stem": "cifar",
    "options": {"channels": [16, 32, 64, 128]},
}

if __name__ == "__main__":
    run_script(["train"], defaults={"dat": {"model": MODEL}}, description=__doc__)
