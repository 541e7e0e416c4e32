"""A program with the configuration of `run.py` whose jobs do nothing, and of which one waits to be ended from outside.

Job `seed=1` waits in its first attempt, unless the file `go` lies in `paths.outputs`.
"""

import os
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from tfmq_exp.cli.job import attempt
from tfmq_exp.cli.status import State


def work(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    with (folder / "attempts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    first = len((folder / "attempts").read_text().splitlines()) == 1
    if cfg.seed == 1 and first and not (Path(cfg.paths.outputs) / "go").exists():
        time.sleep(120)
    return "done", ""


@hydra.main(config_path="../../conf", config_name="config", version_base="1.3")
def wait(cfg: DictConfig) -> None:
    attempt(cfg, work)


if __name__ == "__main__":
    wait()
