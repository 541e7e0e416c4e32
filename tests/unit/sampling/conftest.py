"""A model that is sampled by the scheduler in its folder."""

import pytest

from tests.unit.sampling.folders import Model, save_text_to_image, save_unconditional


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.saved(tmp_path_factory.mktemp("pixels"), save_unconditional)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.saved(tmp_path_factory.mktemp("text"), save_text_to_image)
