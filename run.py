"""Quantize a diffusion model: `python run.py model=digits quant=w4a8 method=tfmq`. See README.md."""

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def run(cfg: DictConfig) -> None:
    """One job."""
    from tfmq_exp.experiment.job import perform  # here, so that --help and --cfg answer at once

    perform(cfg)


if __name__ == "__main__":
    run()
