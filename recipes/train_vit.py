"""Train a vision transformer to be robust.

deepspeed recipes/train_vit.py --deepspeed_config ds_configs/zero2.json

On the digits that ds_configs/ name, a config without a model gets a small ViT. For another model
and other data, set any key: --set dat.model.name=vit_base_patch16_224 --set dat.data.name=...
"""

from dat_ds.cli.main import run_script

if __name__ == "__main__":
    run_script(["train"], description=__doc__)
