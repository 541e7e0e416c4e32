"""Records of what a pipeline gives its denoiser, made by running the pipeline itself with a recorder in the denoiser's place."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor
from torch.nn.functional import pad

from tfmq_exp.core.validate import COUNT
from tfmq_exp.denoisers.pipelines.call_layout import (
    CallLayout,
    conditions_of,
    equal,
    find_layout,
    part_of,
)
from tfmq_exp.denoisers.pipelines.pipeline_calls import Kind, PipelineCalls
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder
from tfmq_exp.denoisers.pipelines.recorded_pipeline import FinishedError, NetworkOutline, Run, record_run

# Arguments of a pipeline's call that a record is not made for: set here, of other inputs than text, or with code.
REFUSED = re.compile(
    r"embeds|mask|image|video|callback|^(prompt|class_labels|latents|generator|output_type|return_dict|eta)$"
)
TEXTS = re.compile(r"(negative_)?prompt(_\d)?")  # one for each image


def check_settings(kind: Any, settings: Mapping[str, Any]) -> None:
    """ValueError for an argument that a pipeline's call does not have, or that is not a setting."""
    allowed = [key for key in inspect.signature(kind.__call__).parameters if key != "self" and not REFUSED.search(key)]
    if unknown := [key for key in settings if key not in allowed]:
        raise ValueError(f"{kind.__name__} takes no setting {unknown[0]!r}; expected some of {', '.join(allowed)}")


def check_choices(kind: Any, network: Any, choices: Sequence[Any]) -> str:
    """The name of the pipeline's argument for texts or classes; ValueError for choices that it cannot be given."""
    texts = "prompt" in inspect.signature(kind.__call__).parameters
    classes = None if texts else int(network.config["num_embeds_ada_norm"])
    right = "texts" if classes is None else f"classes, whole numbers from 0 to {classes - 1}"
    wrong = [
        choice
        for choice in choices
        if (not isinstance(choice, str) if classes is None else type(choice) is not int or not 0 <= choice < classes)
    ]
    if wrong or not choices:
        raise ValueError(f"{kind.__name__} takes {right}: got {f'{wrong[0]!r:.80}' if wrong else 'none'}")
    return "prompt" if texts else "class_labels"


def text_settings(settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Settings for a number of images: further texts are one for all of them; ValueError for several of one kind."""
    found = dict(settings)
    for key, value in settings.items():
        if TEXTS.fullmatch(key) and value is not None:
            distinct = set(value) if isinstance(value, list | tuple) else {value}
            if len(distinct) != 1 or not all(isinstance(text, str) for text in distinct):
                raise ValueError(f"{key} must be one text for all images, got {value!r:.80}")
            found[key] = [*distinct] * count
    return found


def other_choice(choice: str | int) -> str | int:
    """A class that is not this one, or a longer text: with texts of one length pipelines may leave out a mask."""
    return f"a {choice}" if isinstance(choice, str) else choice - 1 if choice else 1


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep diffusers from warning of texts that are cut, where they are not the ones that matter."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class Recorder:
    """A pipeline with its text encoders, to be run for some choices.

    Args:
        folder: of the pipeline.
        settings: of the pipeline's call.
        scheduler: makes a new scheduler.
        encoders: text encoders in place of the folder's, by their names.
    """

    def __init__(
        self,
        folder: PipelineFolder,
        settings: Mapping[str, Any],
        scheduler: Callable[[], Any],
        encoders: Mapping[str, Any] | None = None,
    ) -> None:
        check_settings(folder.kind, settings)
        self.folder, self.settings, self.new_scheduler = folder, settings, scheduler
        self.network = folder.outline(folder.denoiser_name)
        stage: Any = NetworkOutline(folder.outline("vae"), dict)
        stage.decode = self._finish  # pipelines that return latents need no images
        self.parts = {
            **folder.text_components(encoders),
            "vae": stage,
            folder.denoiser_name: NetworkOutline(self.network, dict),
        }

    def _finish(self, *_args: Any, **_options: Any) -> None:
        raise FinishedError

    def run(self, choices: Sequence[Any], **options: Any) -> Run:
        """One run; options are those of `record_run`."""
        name = check_choices(self.folder.kind, self.network, choices)
        pipeline = self.folder.pipeline({**self.parts, "scheduler": self.new_scheduler()})
        arguments = {**text_settings(self.settings, len(choices)), name: list(choices)}
        arguments["generator"] = torch.Generator().manual_seed(0)
        if name == "prompt":
            arguments["output_type"] = "latent"
        return record_run(pipeline, self.network, self.folder.denoiser_name, arguments, **options)


def number(value: Tensor) -> int | float:
    """The exact value of a tensor of one number."""
    return int(value) if not value.is_floating_point() else float(value.double())


def call_timesteps(run: Run) -> tuple[tuple[int | float, ...], str]:
    """The network's timesteps of all calls in order, and their type; ValueError for several in one call."""
    found: list[Tensor] = [torch.as_tensor(call[run.timestep]) for step in run.steps for call in step.calls]
    if wrong := [tuple(t.shape) for t in found if t.dim() > 1 or not bool((t == t.flatten()[0]).all())]:
        raise ValueError(f"timesteps of shape {wrong[0]}: one timestep for each token or row is not supported")
    return tuple(number(t.flatten()[0]) for t in found), str(found[0].dtype).removeprefix("torch.")


def kind_of_conditions(run: Run, layout: CallLayout, kind: Kind) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rows of all images with one kind of condition, and constants of the call; both are empty where there is no such part."""
    if kind not in layout.guidance.order:
        return {}, {}
    call, part = divmod(layout.guidance.order.index(kind), layout.parts)
    values = conditions_of(run, run.steps[0].calls[call], layout.lists)
    rows = {name: value.clone() for name, value in part_of(values, layout.rows, part, layout.parts).items()}
    return rows, {name: value for name, value in values.items() if name not in rows}


def with_equal_lengths(parts: Sequence[Mapping[str, Tensor]], lists: frozenset[str]) -> list[dict[str, Tensor]]:
    """Conditions of several parts whose rows of lists are padded to one length."""
    longest = {name: max(part[name].shape[1] for part in parts if name in part) for name in lists & parts[0].keys()}
    return [
        {
            k: v if k not in longest else pad(v, (0, 0) * (v.dim() - 2) + (0, longest[k] - v.shape[1]))
            for k, v in part.items()
        }
        for part in parts
    ]


def join_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of several runs one below the other; ValueError where they have other shapes."""
    shapes = [{name: tuple(value.shape[1:]) for name, value in part.items()} for part in parts]
    if other := [shape for shape in shapes if shape != shapes[0]]:
        found = f"conditions of other texts have other shapes, {shapes[0]} and {other[0]}"
        raise ValueError(f"{found}: record all of them in one run, with `rows` not below their number")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_null_class(network: Any, null: Mapping[str, Tensor]) -> None:
    """ValueError for a null class that the network has no embedding of."""
    classes = network.config.get("num_embeds_ada_norm")
    if "class_labels" in null and int(null["class_labels"].max()) > classes:
        found = f"the pipeline's null class is {int(null['class_labels'].max())}, the network's is {classes}"
        raise ValueError(f"{found}: set num_embeds_ada_norm to the former, or guidance_scale=1")


def check_scheduler(scheduler: Any, run: Run) -> None:
    """ValueError unless the recorded arguments alone give another scheduler the same steps."""
    scheduler.set_timesteps(**run.set_timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    same = not isinstance(sigmas, Tensor) or equal(sigmas, run.sigmas)
    if not same or not equal(scheduler.timesteps, run.timesteps):
        raise ValueError("the pipeline changes its scheduler by more than set_timesteps, which is not supported")


def record_calls(
    folder: PipelineFolder,
    choices: Sequence[Any],
    settings: Mapping[str, Any],
    *,
    rows: int = 8,
    scheduler: Callable[[], Any] | None = None,
    encoders: Mapping[str, Any] | None = None,
) -> PipelineCalls:
    """Find out what a pipeline gives its denoiser, by running it without its denoiser and first stage.

    Two short runs find which arguments have rows, and the layout of guidance; then all different choices are encoded once. Text
    encoders are read, and freed at the end.

    Args:
        folder: of the pipeline.
        choices: a text for each image, or a class.
        settings: of the pipeline's call: num_inference_steps, height, width, guidance_scale, negative_prompt and others.
        rows: images that are encoded together.
        scheduler: makes a new scheduler; the folder's own by default.
        encoders: text encoders in place of the folder's, by their names.

    Raises:
        FileNotFoundError: a component lacks files.
        ValueError: a component, choices or settings that cannot be, or calls that are not supported (see `find_layout`).
    """
    if not COUNT.fits(rows):
        raise ValueError(f"rows must be {COUNT.right}, got {rows!r}")
    new_scheduler = scheduler or folder.scheduler
    recorder = Recorder(folder, settings, new_scheduler, encoders)
    check_choices(folder.kind, recorder.network, choices)
    pair = [choices[0], other_choice(choices[0])]
    with without_warnings():
        few, more = recorder.run(pair), recorder.run([*pair, pair[1]], equal=True)
    layout, (timesteps, dtype) = find_layout(few, more), call_timesteps(few)
    if call_timesteps(more)[0] != timesteps:
        raise ValueError("the network's timesteps depend on the number of images, which is not supported")
    check_scheduler(new_scheduler(), few)
    distinct = list(dict.fromkeys(choices))
    runs = [recorder.run(distinct[i : i + rows], most_steps=1) for i in range(0, len(distinct), rows)]
    found, constants = zip(*(kind_of_conditions(run, layout, "given") for run in runs), strict=True)
    null, null_constants = kind_of_conditions(runs[0], layout, "null")
    check_null_class(recorder.network, null)
    *parts, null = with_equal_lengths([*found, null], layout.lists)
    given = join_rows(parts)
    index = torch.tensor([distinct.index(choice) for choice in choices])
    return PipelineCalls(
        sample=few.sample,
        timestep=few.timestep,
        sample_shape=tuple(few.steps[0].calls[0][few.sample].shape[1:]),
        given={name: value[index] for name, value in given.items()},
        null={name: value[:1] for name, value in null.items()},
        constants=constants[0],
        null_constants={k: v for k, v in null_constants.items() if not equal(v, constants[0].get(k, layout))},
        lists=layout.lists | ({few.sample} if few.listed else set()),
        guidance=layout.guidance,
        timesteps=timesteps,
        timestep_dtype=dtype,
        set_timesteps=few.set_timesteps,
        scheduler_timesteps=tuple(number(t) for t in few.timesteps),
        scheduler_sigmas=tuple(float(sigma.double()) for sigma in few.sigmas),
    )
