"""Quantize a diffusion model: `python run.py model=digits quant=w4a8 method=tfmq`. See README.md."""

import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tfmq_exp.cli.overrides import read_arguments, unknown_keys, unreadable
from tfmq_exp.cli.terminal import Terminal, say_error, standard_streams


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def run(cfg: DictConfig) -> None:
    """One job."""
    from tfmq_exp.cli.job import perform  # here, so that --help and --cfg answer at once

    perform(cfg)


def main() -> None:
    """Hand the command line to Hydra; where it has only a riddle to say of it, say what to type.

    Raises:
        SystemExit: with status 1, for an override that cannot be read or a key that is not there.
    """
    arguments, console, conf = read_arguments(sys.argv[1:]), Terminal(stderr=True), Path(__file__).parent / "conf"
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever leaves off reading has read enough
    if arguments.shell_completion:  # of what is typed so far
        run()
        return
    for line in (wrong := unreadable(arguments, conf)):
        say_error(console, line)
    if wrong:
        raise SystemExit(1)
    try:
        run()
    except SystemExit as end:
        if end.code == 1 and (arguments.multirun or not HydraConfig.initialized()):  # before any job
            for line in unknown_keys(arguments, conf):
                say_error(console, line)
        raise


if __name__ == "__main__":
    with standard_streams():
        main()
