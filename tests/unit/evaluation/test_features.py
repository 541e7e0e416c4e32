"""The Inception network: the port's own outputs, and weights that are read without running anything."""

import io
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.features import InceptionFeatures, inception_extractor, load_inception


def test_features_are_those_of_torch_fidelity(inception_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Spatial features by the other definition: the first 7 channels of the whole block's output, element by element."""
    images = pictures(2, 40, seed=0)
    port = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_file))
    blocks: list[Tensor] = []
    port.Mixed_6d.register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    pooled, logits = port(images)
    extract = inception_extractor(str(inception_file), batch_size=1, device="cpu")
    assert "not the released" in caplog.text
    assert len(extract.identity["extractor_sha256"]) == 64
    assert extract.identity["versions"].keys() == {"torch-fidelity", "torchmetrics"}
    ours = extract(images)
    torch.testing.assert_close(ours.pooled, pooled)
    torch.testing.assert_close(ours.logits, logits)
    assert ours.spatial.shape == (2, 2023)
    rows, columns, channels = torch.meshgrid(torch.arange(17), torch.arange(17), torch.arange(7), indexing="ij")
    flat = (rows * 17 + columns) * 7 + channels
    torch.testing.assert_close(ours.spatial[:, flat.flatten()], blocks[0][:, channels, rows, columns].flatten(1))


def test_both_formats_give_the_same_network_and_torch_load_never_gets_the_file(
    inception_file: Path, inception_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.load

    def load(source: object, **options: object) -> object:
        assert isinstance(source, io.BytesIO)
        return original(source, **options)

    monkeypatch.setattr(torch, "load", load)
    for path in (inception_file, inception_file.with_suffix(".safetensors")):
        state = load_inception(path).state_dict()
        assert state.keys() == inception_state.keys()
        assert all(torch.equal(state[name], value) for name, value in inception_state.items())


def test_a_file_without_counters(inception_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in inception_state.items() if not k.endswith("num_batches_tracked")}, path)
    assert torch.equal(load_inception(path).fc.weight, inception_state["fc.weight"])


def test_a_missing_file_says_where_it_is_published(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_inception(tmp_path / "nowhere.pth")
    for part in ("nowhere.pth", "weights-inception-2015-12-05-6726825d.pth", "v0.2.0", "nothing is downloaded"):
        assert part in str(error.value)


class Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo ran > ran",)


def test_a_file_that_would_run_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.bias": Command()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"refuses to load 'posix\.system'"):
        load_inception(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fc.bias": None}, "fc.bias"),
        ({"fc.bias": torch.zeros(1000)}, "fc.bias"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight"),
        ({"fc.bias": torch.zeros(1008).half()}, "float16"),
        ({"fc.bias": torch.zeros(1008).int()}, "int32"),
    ],
    ids=["missing", "shape", "extra", "half", "int"],
)
def test_weights_of_another_network(
    inception_state: dict[str, Tensor], tmp_path: Path, change: dict[str, Tensor | None], named: str
) -> None:
    state = {name: value for name, value in {**inception_state, **change}.items() if value is not None}
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=named):
        load_inception(tmp_path / "weights.safetensors")


def test_images_of_another_kind_are_refused() -> None:
    extract = InceptionFeatures(nn.Identity())  # type: ignore[arg-type]  # which is not reached
    for images in (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError, match="uint8 images"):
            extract(images)
