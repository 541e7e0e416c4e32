"""The captions of a run: which file they come from, and what there is to say of them."""

import functools
import logging
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from tfmq_exp.pipeline.stages import Stages
from tfmq_exp.sampling.conditioning import Captions
from tfmq_exp.sampling.guidance import Sampling

log = logging.getLogger(__name__)


def make_sampling(cfg: DictConfig) -> Sampling:
    """How images are sampled; a file of captions that is named stands for the model's own choice of conditions."""
    make: Any = functools.partial(instantiate, _convert_="all")
    own = make(cfg.model.sampling)
    captions = {} if cfg.captions is None else {"conditioning": Captions.read(str(cfg.captions))}
    return Sampling(make(cfg.sampler), **(own | captions))


def report_captions(stages: Stages) -> None:
    """Captions that the network does not hear whole, and fewer of them than images."""
    captions = stages.captions if stages.processes.is_main else {}
    if captions.get("cut"):
        log.warning(
            "%d of %d captions are longer than the text model takes, and are cut to %d tokens",
            *(captions[key] for key in ("cut", "different", "tokens")),
        )
    if captions and captions["different"] < stages.images.count:
        log.warning("%d images have %d different captions", stages.images.count, captions["different"])
