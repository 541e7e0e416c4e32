"""Scores against the textbook formulas, in double precision, for any shards and any number of processes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.helpers.evaluation import TensorDataset, frechet, linear_extractor, measured, pictures, score
from tfmq_exp.evaluation.features import Features, digits_extractor
from tfmq_exp.evaluation.metrics import GaussianStatistics
from tfmq_exp.evaluation.references import ReferenceStatistics
from tfmq_exp.evaluation.scores import Evaluator, Scores

SHAPE = (1, 6, 6)
REAL, GENERATED = pictures(300, 6, 0, channels=1), pictures(250, 6, 1, channels=1)


class Brightness:
    """Scores a caption by its length and an image by its mean."""

    identity = {"metric": "brightness"}
    needs_captions = True

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return images.double().mean((1, 2, 3)) - 100 * torch.tensor([len(caption) for caption in captions])


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator("random", linear_extractor(SHAPE), TensorDataset(REAL), kid=True, precision_recall=True)


@pytest.fixture(scope="module")
def reference(evaluator: Evaluator) -> ReferenceStatistics:
    return measured(evaluator)


def test_frechet_distances(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    ours = score(evaluator, reference, [GENERATED])
    for name, part in (("fid", "pooled"), ("sfid", "spatial")):
        features = [getattr(evaluator.extract(x), part).double().numpy() for x in (REAL, GENERATED)]
        assert ours[name] == pytest.approx(frechet(*features), rel=1e-4)


def test_inception_score_of_few_images_is_over_one_part_in_adms_convention(
    evaluator: Evaluator, reference: ReferenceStatistics
) -> None:
    p = evaluator.extract(GENERATED).logits.double().softmax(1).numpy()
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    ours = score(evaluator, reference, [GENERATED])
    assert ours["is_adm"] == pytest.approx(math.exp(divergence), rel=1e-5)
    assert ours["is_adm"] > 1.05


def test_shards_make_no_difference_and_neither_does_the_global_seed(
    evaluator: Evaluator, reference: ReferenceStatistics
) -> None:
    torch.manual_seed(5)
    whole = score(evaluator, reference, [GENERATED])
    assert whole.keys() == {"fid", "sfid", "is", "is_adm", "kid", "precision", "recall"}
    torch.manual_seed(6)
    assert score(evaluator, reference, GENERATED.split(37)) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_gathered_apart_merge_into_the_whole(
    evaluator: Evaluator, reference: ReferenceStatistics, order: tuple[int, ...]
) -> None:
    """Three processes with images in turn and of different number, and what they hand over as bytes."""
    parts = [Scores(evaluator, reference) for _ in range(3)]
    starts = [0, 30, 31, 100, 170, 222]
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], len(GENERATED)], strict=True)):
        parts[i % 3].update(GENERATED[start:stop], start)
    whole = Scores(evaluator, reference)
    for i in order:
        whole.merge(load(save(parts[i].tensors())))
    assert whole.compute() == pytest.approx(score(evaluator, reference, [GENERATED]), rel=1e-6)


def test_order_matters_to_the_scores_that_the_merge_has_to_keep_it_for(
    evaluator: Evaluator, reference: ReferenceStatistics
) -> None:
    ours = score(evaluator, reference, [GENERATED])
    assert score(evaluator, reference, [GENERATED.flip(0)])["is"] != pytest.approx(ours["is"], rel=1e-6)


def test_images_that_came_twice_or_not_at_all(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    one, other = Scores(evaluator, reference), Scores(evaluator, reference)
    one.update(GENERATED[:10], 0)
    other.update(GENERATED[8:20], 8)
    other.merge(one.tensors())
    with pytest.raises(ValueError, match="image 8 came twice"):
        other.compute()
    one.update(GENERATED[15:20], 15)
    with pytest.raises(ValueError, match="images 10 to 14 are missing"):
        one.compute()
    one.update(GENERATED[9:12], 9)
    with pytest.raises(ValueError, match="image 9 came twice"):
        one.compute()


def test_rows_are_kept_only_where_a_score_reads_them(evaluator: Evaluator) -> None:
    plain = dataclasses.replace(evaluator, kid=False, precision_recall=False)
    statistics = measured(plain)
    assert len(statistics.manifold) == 0
    scores = Scores(plain, statistics)
    scores.update(GENERATED, 0)
    assert scores.rows[0]["pooled"].numel() == 0
    assert scores.compute().keys() == {"fid", "sfid", "is", "is_adm"}
    with pytest.raises(ValueError, match="none were kept"):
        Scores(evaluator, statistics)


def test_images_at_equal_distances_in_the_reference_make_the_manifold(evaluator: Evaluator) -> None:
    few = dataclasses.replace(evaluator, manifold_images=40)
    ours = score(few, measured(few), [GENERATED])
    spread = [i * len(REAL) // 40 for i in range(40)]
    half = dataclasses.replace(evaluator, reference=TensorDataset(REAL[spread]))
    expected = score(half, measured(half), [GENERATED])
    assert {k: ours[k] for k in ("kid", "precision", "recall")} == {
        k: expected[k] for k in ("kid", "precision", "recall")
    }
    assert ours["fid"] != expected["fid"]


def test_the_reference_itself_is_at_distance_zero(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    ours = score(evaluator, reference, [REAL])
    assert abs(ours["fid"]) < 1e-3
    assert abs(ours["sfid"]) < 1e-3
    assert (ours["precision"], ours["recall"]) == (1.0, 1.0)


def test_fewer_than_two_images(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    with pytest.raises(ValueError, match="at least two images, got 1"):
        score(evaluator, reference, [GENERATED[:1]])
    with pytest.raises(ValueError, match="at least two images, got 0"):
        score(evaluator, reference, [])


ALL = {"fid", "sfid", "is", "is_adm", "kid", "precision", "recall"}


@pytest.mark.parametrize(
    ("generated", "real", "left_out", "said"),
    [
        (2, 300, {"is", "is_adm", "precision", "recall"}, ["no Inception scores, which need 10 images; there are 2"]),
        (3, 300, {"is", "is_adm", "precision", "recall"}, ["3 images are too few for precision and recall"]),
        (4, 300, {"is", "is_adm"}, ["4 generated images for 5 pooled and 7 spatial"]),
        (10, 300, set(), ["an Inception score over parts of 1 images is at most that number"]),
        (250, 2, {"precision", "recall"}, ["2 reference images for", "2 images are too few for precision and recall"]),
        (250, 3, {"precision", "recall"}, ["3 images are too few for precision and recall"]),
        (250, 300, set(), []),
    ],
)
def test_a_score_that_needs_more_images_is_left_out_and_never_nan(
    evaluator: Evaluator,
    generated: int,
    real: int,
    left_out: set[str],
    said: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    few = dataclasses.replace(evaluator, reference=TensorDataset(REAL[:real]))
    found = score(few, measured(few), [GENERATED[:generated]])
    assert found.keys() == ALL - left_out
    assert all(map(math.isfinite, found.values()))
    for words in said:
        assert words in caplog.text
    assert said or not caplog.records


def test_a_reference_with_features_of_one_image_leaves_kid_out(
    evaluator: Evaluator, reference: ReferenceStatistics, caplog: pytest.LogCaptureFixture
) -> None:
    single = dataclasses.replace(reference, manifold=reference.manifold[:1])
    assert score(evaluator, single, [GENERATED]).keys() == {"fid", "sfid", "is", "is_adm"}
    assert "1 images are too few for precision and recall or KID" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["pooled", "spatial", "logits"])
def test_features_that_are_not_finite_end_the_scoring(evaluator: Evaluator, part: str, value: float) -> None:
    def network(images: Tensor) -> Features:
        features = evaluator.extract.network(images)
        getattr(features, part)[0, 1] = value
        return features

    broken = dataclasses.replace(evaluator.extract, network=network, batch_size=100)
    with pytest.raises(ValueError, match=f"the {part} features of 3 of 250 images are not finite"):
        broken(GENERATED)


def test_a_score_that_is_not_finite_is_named(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    wrong = dataclasses.replace(evaluator, image_scores={"brightness": Brightness()})
    with pytest.raises(ValueError, match="random: the score fid of 250 images is nan"):
        score(evaluator, dataclasses.replace(reference, pooled=unknown(reference.pooled)), [GENERATED])
    scores = Scores(wrong, reference)
    scores.update(GENERATED, 0, ["a caption"] * len(GENERATED))
    for value in (math.inf, math.nan):
        scores.rows[0]["brightness"][3] = value
        with pytest.raises(ValueError, match=f"the score brightness of 250 images is {value}"):
            scores.compute()


def unknown(gaussian: GaussianStatistics) -> GaussianStatistics:
    return GaussianStatistics(gaussian.mean * math.nan, gaussian.covariance)


@pytest.mark.parametrize("images", [pictures(4, 7, 0, channels=1), pictures(4, 6, 0), GENERATED.float()])
def test_images_of_another_kind_than_the_references(
    evaluator: Evaluator, reference: ReferenceStatistics, images: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"reference's images are uint8 \(1, 6, 6\), the generated ones"):
        score(evaluator, reference, [images])


def test_a_reference_that_does_not_say_its_size(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    silent = dataclasses.replace(reference, shape=None)
    assert score(evaluator, silent, [GENERATED]) == score(evaluator, reference, [GENERATED])


def test_captions_reach_their_images(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    captioned = dataclasses.replace(evaluator, image_scores={"brightness": Brightness()})
    captions = ["x" * (i % 2) for i in range(len(GENERATED))]
    ours = score(captioned, reference, GENERATED.split(37), lambda indices: [captions[i] for i in indices])
    expected = GENERATED.double().mean() - 100 * np.mean([len(caption) for caption in captions])
    assert ours["brightness"] == pytest.approx(float(expected), rel=1e-6)
    wrong: list[Any] = [[], ["one"], list(range(len(GENERATED)))]
    for given in wrong:
        with pytest.raises(ValueError, match="a caption for each image"):
            score(captioned, reference, [GENERATED], lambda _, given=given: given)


def test_scores_of_single_images_are_kept_in_their_order(evaluator: Evaluator, reference: ReferenceStatistics) -> None:
    captioned = dataclasses.replace(evaluator, image_scores={"brightness": Brightness()})
    captions = ["x" * (i % 2) for i in range(len(GENERATED))]
    parts = [Scores(captioned, reference) for _ in range(2)]
    parts[1].update(GENERATED[100:], 100, captions[100:])
    parts[0].update(GENERATED[:100], 0, captions[:100])
    parts[0].merge(load(save(parts[1].tensors())))
    expected = [float(x.double().mean()) - 100 * len(caption) for x, caption in zip(GENERATED, captions, strict=True)]
    assert parts[0].image_rows()["brightness"].tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"image_scores.fid: a score of single images may not be called"):
        dataclasses.replace(evaluator, image_scores={"fid": Brightness()})


def test_an_extractor_without_maps_and_logits_has_neither_sfid_nor_inception_scores(evaluator: Evaluator) -> None:
    def network(images: Tensor) -> Features:
        pooled = evaluator.extract.network(images).pooled
        return Features(pooled, pooled[:, :0], pooled[:, :0])

    extract = dataclasses.replace(evaluator.extract, network=network, widths=(5, 0))
    plain = dataclasses.replace(evaluator, extract=extract, cmmd=True)
    statistics = measured(plain)
    found = score(plain, statistics, GENERATED.split(60))
    assert found.keys() == {"fid", "kid", "cmmd", "precision", "recall"}
    kept = score(evaluator, measured(evaluator), [GENERATED])
    assert {name: found[name] for name in ("fid", "kid")} == pytest.approx(
        {name: kept[name] for name in ("fid", "kid")}
    )


def test_metrics_are_part_of_the_identity(evaluator: Evaluator) -> None:
    changed = [
        dataclasses.replace(evaluator, name="another"),
        dataclasses.replace(evaluator, kid=False),
        dataclasses.replace(evaluator, cmmd=True),
        dataclasses.replace(evaluator, manifold_images=7),
        dataclasses.replace(evaluator, image_scores={"brightness": Brightness()}),
    ]
    identities = [str(e.identity) for e in (evaluator, *changed)]
    assert len(set(identities)) == 6
    with pytest.raises(ValueError, match=r"manifold_images must be a whole number, at least 1 .*, got 0"):
        dataclasses.replace(evaluator, manifold_images=0)


def test_the_digit_classifier_knows_digits_and_its_scores_get_worse_with_noise() -> None:
    from tfmq_exp.data.digits import DigitsImages

    evaluator = Evaluator("digits features", digits_extractor(), DigitsImages())
    clean = next(DigitsImages().batches(400))
    noise = torch.randint(0, 128, clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noisy = (clean.int() + noise.int()).clamp(0, 255).to(torch.uint8)
    reference = measured(evaluator)
    good, bad = score(evaluator, reference, [clean]), score(evaluator, reference, [noisy])
    assert good["fid"] < bad["fid"] / 5
    assert good["sfid"] < bad["sfid"]
    assert good["is"] > bad["is"]
    assert reference.provenance["images"] == 1797


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 32, 32), (1, 8, 8)])
def test_the_digit_classifier_refuses_images_of_another_form(shape: tuple[int, int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"eval=digits .* these have {shape[0]} channels of {shape[1]}x{shape[2]} pixels"
    ):
        digits_extractor()(torch.zeros(2, *shape, dtype=torch.uint8))


def test_the_classifier_is_as_accurate_as_its_record_says_on_digits_it_never_saw() -> None:
    from tfmq_exp.data.digits import load_images
    from tfmq_exp.denoisers.digits import load_classifier

    classifier, _ = load_classifier()
    images, labels = load_images()
    held_out = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:360]
    accuracy = (classifier(images[held_out]).logits.argmax(1) == labels[held_out]).float().mean()
    assert accuracy >= 0.98
