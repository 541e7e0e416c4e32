"""A model that is sampled by the scheduler in its folder."""

import pytest

from tests.unit.sampling.folders import Model, put_scheduler, save_unconditional
from tfmq_exp.denoisers.loading.pretrained import load_denoiser


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("pixels")
    save_unconditional(folder)
    put_scheduler(folder, "DDIMScheduler", {})
    return Model(folder, load_denoiser("pixels", folder, None, False))
