"""Every number and every switch of a configuration is what it can be, or is refused by its name and with its value."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from tests.e2e.jobs import CONF, composed
from tfmq_exp.cli.job import root_cause
from tfmq_exp.cli.run_info import current_run
from tfmq_exp.cli.validation import check
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig

pytestmark = pytest.mark.bad_input

# together they have every class of conf/method
METHODS = (
    ("method=tfmq",),
    ("method=gptq_reconstruct", "method/weights/early_stop=settled"),
    ("method=ptqd",),
    ("method=qdrop",),
    ("method=ptq4dm",),
    ("method=tfmq_cache",),
    ("method=tfmq_basis", "method/weights/recipe/objective=segments"),
    ("method=intervals",),
    ("method=tdq", "method/scales/encoding=fourier"),
    ("method=tdq_thin",),
    ("method=dynamic_generator_time",),
    ("method=duq",),
    ("method=qil",),
    ("method=pact",),
    ("method=lsq", "method/surgery/qat=lsq_as_released"),
    ("method=nearest", "method/weight_observer=kl"),
    ("method=nearest", "method/weight_observer=histogram"),
    ("method=nearest", "method/weights=reconstruct", "method/weights/recipe/objective=fisher"),
)
FEWER, NEAREST = "protocol.calibration.num_inference_steps", "method.surgery.outside_timesteps=nearest"
NEVER = (math.nan, math.inf, -math.inf, "abc", -1, -0.5, [])


def records(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `_target_`, and where it stands."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield place, node
        for key, value in node.items():
            yield from records(value, f"{place}.{key}" if place else key)


PIPELINE = Path(__file__).parents[1] / "goldens/transformers/pipelines/dit"


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """Every field that holds a number or a switch, once for each class, with a whole record that has it."""
    found: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    tmp = tmp_path_factory.mktemp("values")
    for words in METHODS:
        plain: Any = OmegaConf.to_container(composed(tmp, *words), resolve=True)
        for place, node in records({"method": plain["method"]}):
            for name, value in node.items():
                if isinstance(value, int | float):
                    found.setdefault((node["_target_"], name), (place, node))
    DDIMScheduler().save_pretrained(tmp / "scheduler")
    known = {"num_inference_steps": 4, "eta": 0.0, "path": str(tmp)}
    for path in sorted((CONF / "sampler").glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))  # its values of the protocol stay interpolations
        given = (
            {**known, "path": str(PIPELINE), "settings": {}, "checkpoint": None} if path.stem == "pipeline" else known
        )
        node = {key: given.get(key, value) for key, value in node.items()}
        for name, value in node.items():
            if isinstance(value, int | float):
                found.setdefault((node["_target_"], name), ("sampler", node))
    return found


def test_every_number_and_switch_of_a_method_and_a_sampler(fields: dict[tuple[str, str], Any]) -> None:
    found = fields
    assert len(found) >= 75
    passed: list[str] = []
    for (target, name), (place, node) in found.items():
        instantiate(node, _convert_="all")
        switch = isinstance(node[name], bool)
        for value in ("no", 2, None, [], 0.5) if switch else NEVER:
            try:
                instantiate(OmegaConf.create({place.split(".")[-1]: node | {name: value}}), _convert_="all")
            except InstantiationException as error:
                reason = root_cause(error)
                if not (isinstance(reason, ValueError) and name in str(reason)):
                    passed.append(f"{target}.{name}={value!r}: {type(reason).__name__} {reason}")
            else:
                passed.append(f"{target}.{name}={value!r}: accepted")
    assert passed == []


def begin(cfg: DictConfig) -> None:
    """What a job does before it reads a network."""
    check(cfg, current_run())
    Sampling(instantiate(cfg.sampler, _convert_="all"), **instantiate(cfg.model.sampling, _convert_="all"))
    instantiate(cfg.method, _convert_="all")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("protocol.sampling.eta=2",), "protocol.sampling.eta must be a number from 0 to 1, got 2"),
        (("sampler.eta=-0.5",), "sampler.eta must be a number from 0 to 1, got -0.5"),
        (("sampler.eta=nan",), "sampler.eta must be a number from 0 to 1, got nan"),
        (
            ("sampler.num_inference_steps=0",),
            "sampler.num_inference_steps must be a whole number, at least 1 and below 2**31, or null, got 0",
        ),
        (("method.weight_observer.p=0",), "method.weight_observer.p must be a number above 0, at most 20, got 0"),
        (("method.weight_observer.p=nan",), "method.weight_observer.p must be a number above 0, at most 20, got nan"),
        (("method.weight_observer.p=inf",), "method.weight_observer.p must be a number above 0, at most 20, got inf"),
        (("method.weight_observer.candidates=0",), "method.weight_observer.candidates must be a whole number"),
        (("method.weight_observer.shrink=0.02",), "shrink must be below 0.0127"),
        (("method.scales.temporal.momentum=1",), "method.scales.temporal.momentum must be a number, at least 0"),
        (
            ("method/weight_observer=histogram", "+method.weight_observer.mass=1.5"),
            "method.weight_observer.mass must be",
        ),
        (("method.weights.recipe.rounding.annealing.warmup=1",), "recipe.rounding.annealing.warmup must be"),
        (("method.weights.recipe.rounding.annealing.end=30",), "must fall from start to end, got 20.0 to 30"),
        (("method.weights.recipe.rounding.learning_rate=0",), "method.weights.recipe.rounding.learning_rate must be"),
        (("method.weights.recipe.parts=64",), "a batch of 32 can have 1 to 32 parts, got 64"),
        (
            ("method=qdrop", "method.weights.recipe.inputs.quant_prob=1.5"),
            "method.weights.recipe.inputs.quant_prob must be",
        ),
        (("method=tdq", "protocol.scales.encoding_width=3"), "encoding.width must be an even whole number"),
        (("method=intervals", "method.scales.temporal.count=2000"), "count must be at most train_timesteps, 1000"),
        (
            ("method=lsq", "method.weights.protocol.gradient_clip_val=-1"),
            "method.weights.protocol.gradient_clip_val must be a number above 0, or null",
        ),
        (
            ("method=lsq", "method.weights.protocol.warmup_start_factor=0"),
            "method.weights.protocol.warmup_start_factor must be a number above 0",
        ),
        (
            ("method=lsq", "method.weights.protocol.condition_dropout=2"),
            "method.weights.protocol.condition_dropout must be a number from 0 to 1",
        ),
        (("model.sampling.guidance=-1",), "model.sampling.guidance must be a number, at least 0, or null, got -1"),
        (("model.sampling.guidance=nan",), "model.sampling.guidance must be a number, at least 0, or null, got nan"),
        (
            ("model.sampling.precision=float8",),
            "precision must be one of float32, tf32, bfloat16, float16, got 'float8'",
        ),
        (("protocol.scales.learning_rate=1e30",), "protocol.scales.learning_rate must be a number above 0, at most 10"),
        (("protocol.sampling.images=1",), "protocol.sampling.images must be at least 2 for scores, got 1"),
        (("eval.kid=2",), "eval.kid must be true or false, got 2"),
        (("eval.manifold_images=0",), "eval.manifold_images must be a whole number"),
        (("quant.activation=[]",), "quant.activation must be a whole number from 2 to 8"),
        (("quant.activation=[8,8]",), "quant.activation must be a whole number from 2 to 8"),
        (("quant.activation=8.0",), "quant.activation must be a whole number from 2 to 8"),
        (("quant.activation=true",), "quant.activation must be a whole number from 2 to 8"),
        (("quant.weight='4'",), "quant.weight must be a whole number from 2 to 8, or null (float), got '4'"),
        (("quant.weight=[4]",), "quant.weight must be a whole number from 2 to 8, or null (float), got [4]"),
        (("quant.weight=1",), "quant.weight must be a whole number from 2 to 8, or null (float), got 1"),
        (("quant.weight=9",), "quant.weight must be a whole number from 2 to 8, or null (float), got 9"),
        (("quant.name=w2a4",), "quant.name must be w4a8, whose bits these are, got 'w2a4'"),
        (("quant=w4a32", "quant.name=w4a8"), "quant.name must be w4a32, whose bits these are, got 'w4a8'"),
        (("method.surgery.roles.stem.input=[]",), "roles.stem.input: activation bits"),
        (("method.surgery.roles.head.weight=[4]",), "roles.head.weight must be one number of bits"),
        (
            ("method.surgery.outside_timesteps=closest",),
            "outside_timesteps must be one of error, nearest, got 'closest'",
        ),
        ((f"{FEWER}=0",), f"{FEWER} must be a whole number, at least 1 and below 2**31, or null, got 0"),
        ((f"{FEWER}=10",), f"{FEWER}=10 needs method.surgery.outside_timesteps=nearest, got error"),
        ((f"{FEWER}=10", NEAREST, "engine=openvino"), f"{FEWER}=10 needs engine=none"),
        ((f"{FEWER}=10", NEAREST, "method=ptqd", "quant=w4a468"), f"{FEWER}=10 needs one width of activations, got"),
        (("runtime.checkpoint_every_min=1e30",), "runtime.checkpoint_every_min must be a number from 0 to 525600"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """What `run.py` says in its one line, before a network is read."""
    cfg = composed(tmp_path, *words)
    with pytest.raises((ValueError, InstantiationException)) as error:
        begin(cfg)
    assert re.search(re.escape(said), str(root_cause(error.value)))


def test_what_means_something_is_accepted(tmp_path: Path) -> None:
    for words in (
        ("quant.weight=8",),  # said in the tables, beside the name
        ("quant.name=mine",),
        ("quant=w4a468", "method=ptqd"),
        ("protocol.sampling.images=1", "until=images"),
        ("sampler.eta=1", "model.sampling.guidance=0"),
        ("method.weight_observer.p=1", "method.scales.temporal.momentum=0"),
        ("method=qdrop", "method.weights.recipe.inputs.quant_prob=0"),
        ("protocol.reconstruction.learning_rate=1",),
        ("method.surgery.roles.stem.weight=null",),
    ):
        begin(composed(tmp_path, *words))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf, True, "1", None])
def test_a_library_user_is_told_too(eta: Any) -> None:
    with pytest.raises(ValueError, match=r"DDIM\.eta must be a number from 0 to 1, got"):
        DDIM(4, eta)


@pytest.mark.parametrize("bits", [[], [8, 8], [8.0], 8.0, True, "8", 3, 9, -1, math.nan])
def test_bits_that_no_activation_has(bits: Any) -> None:
    roles = {role.value: LayerBits(4, 8) for role in Role}
    with pytest.raises(ValueError, match=r"roles\.head\.input: activation bits|several roles\.head\.input: activation"):
        QuantizationConfig(roles | {"head": LayerBits(4, bits)})
    with pytest.raises(ValueError, match=r"attention\.operands: attention operand bits"):
        QuantizationConfig(roles, AttentionBits(operands=bits))


def test_every_class_of_a_method_is_tried(fields: dict[tuple[str, str], Any]) -> None:
    """A class that a file of conf/method names and that has numbers must be among those above."""
    tried = {target for target, _ in fields}
    for path in (CONF / "method").rglob("*.yaml"):
        for _, node in records(OmegaConf.to_container(OmegaConf.load(path))):
            numbers = [k for k, v in node.items() if isinstance(v, int | float) and k != "_target_"]
            if numbers:
                assert node["_target_"] in tried, (path, numbers)
                assert callable(get_object(node["_target_"]))
