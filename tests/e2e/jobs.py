"""Run a job of `run.py` inside the test process: same configuration, same code, no second import of everything."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from tfmq_exp.cli.job import attempt
from tfmq_exp.cli.main import work

CONF = Path(__file__).parents[2] / "conf"


def composed(folder: Path, *overrides: str) -> DictConfig:
    """The configuration of a job that writes under `folder`, with Hydra's own part filled in as `run.py` would."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"paths.outputs={folder}", *overrides], return_hydra_config=True)
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(run)
        cfg.hydra.overrides.task = list(overrides)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg.hydra
    OmegaConf.set_struct(cfg, True)
    return cfg


def job(folder: Path, *overrides: str) -> Path:
    """Run one job to the end; returns its run folder."""
    attempt(composed(folder, *overrides), work)
    return folder / "run"
