"""Final latents to images by the end of the pipeline's own program: its units, packing, first stage and range; and images to latents."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import COUNT
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder
from tfmq_exp.denoisers.pipelines.pipeline_recording import check_settings
from tfmq_exp.denoisers.pipelines.recorded_pipeline import (
    NetworkOutline,
    Prediction,
    Step,
    prediction_shape,
    stack_rows,
)

GUIDANCE = ("guidance_scale", "true_cfg_scale")
SAME = 1e-3  # of a pixel in [-1, 1]: latents decoded by the pipeline and by the first stage itself


def text_arguments(kind: Any, rows: int, width: int) -> dict[str, Any]:
    """Arguments of a pipeline's call in the place of a prompt, so that it needs no text encoder; their values do not matter.

    Args:
        kind: class of the pipeline.
        rows: images.
        width: channels of the pooled text, which some pipelines check.
    """
    names = [name for name in inspect.signature(kind.__call__).parameters if not name.startswith("negative")]
    if "class_labels" in names:
        return {"class_labels": [0] * rows}
    found: dict[str, Any] = {}
    for name in (name for name in names if "prompt" in name):
        if "mask" in name:
            found[name] = torch.ones(rows, 1, dtype=torch.long)
        elif "embeds" in name:
            found[name] = torch.zeros(rows, width) if "pooled" in name else torch.zeros(rows, 1, 1)
    return found


def pooled_width(network: Any) -> int:
    """Channels of the pooled text that a UNet takes beside six numbers of sizes (SDXL); 1 where none is checked."""
    if network.config.get("addition_embed_type") != "text_time":
        return 1
    return network.config["projection_class_embeddings_input_dim"] - 6 * network.config["addition_time_embed_dim"]


class PipelineDecoder:
    """The first stage of a pipeline, and what the pipeline does with its final latents before and after it.

    The pipeline runs without text encoders and denoiser, and its scheduler returns the latents in question. They are those of the
    sampling loop, in the form in which the network takes them: packed, of one image or video.

    Args:
        folder: of the pipeline; only the first stage's weights are read.
        settings: of the pipeline's call, as for `record_calls`: sizes and numbers of frames.
        rows: images that are decoded together.
    """

    def __init__(self, folder: PipelineFolder, settings: Mapping[str, Any], rows: int = 8) -> None:
        if not COUNT.fits(rows):
            raise ValueError(f"rows must be {COUNT.right}, got {rows!r}")
        check_settings(folder.kind, settings)
        known = inspect.signature(folder.kind.__call__).parameters
        unguided = {key: 0.0 for key in GUIDANCE if key in known and isinstance(known[key].default, int | float)}
        self.settings = {key: value for key, value in settings.items() if "prompt" not in key} | unguided
        self.settings |= {"output_type": "np", "return_dict": False}
        self.rows, self.folder = rows, folder
        self.network, self.autoencoder = folder.outline(folder.denoiser_name), folder.network("vae")

    def _predict(self, arguments: dict[str, Any]) -> Prediction:
        value = next(iter(arguments.values()))
        sample = stack_rows(value)
        result = sample.new_zeros(prediction_shape(self.network, sample))
        return Prediction(list(result.unbind()) if isinstance(value, list) else result)

    def _run(self, x: Tensor) -> Tensor:
        scheduler, outline = self.folder.scheduler(), NetworkOutline(self.network, self._predict)

        def step(model_output: Tensor, *_args: Any, **_options: Any) -> Step:
            if x.numel() != model_output.numel():
                made = f"the settings make {tuple(model_output.shape)}"
                raise ValueError(
                    f"latents of shape {tuple(x.shape)}, and {made}: expected the same height, width and frames"
                )
            latents = x.reshape(model_output.shape)  # some networks take an axis of one frame more
            return Step(latents, latents)

        scheduler.step = step
        outline.device = x.device
        parts = {"vae": self.autoencoder.to(x.device), self.folder.denoiser_name: outline, "scheduler": scheduler}
        width = pooled_width(self.network)
        arguments = {**self.settings, **text_arguments(self.folder.kind, len(x), width)}
        arguments["generator"] = torch.Generator().manual_seed(0)
        return torch.from_numpy(self.folder.pipeline(parts)(**arguments)[0]).movedim(-1, 1)

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch 3 ..."]:
        """Images [batch, 3, height, width] of latents, or videos [batch, 3, frames, height, width], within [-1, 1]."""
        return torch.cat([self._run(part) for part in x.split(self.rows)]).to(x.device) * 2 - 1

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """Latents of images in [-1, 1] as `decode` takes them: the mean of the first stage's, in units of its configuration.

        Raises:
            ValueError: a pipeline that packs its latents, or has other units: they would not come back by `decode`.
        """
        stage, parts, found = self.autoencoder.to(images.device), images.split(self.rows), list[Tensor]()
        for part in parts:
            encoded = stage.encode(part)
            found.append(encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode())
        config, first = stage.config, found[0]
        latents = (torch.cat(found) - (config.get("shift_factor") or 0)) * config["scaling_factor"]
        try:
            back = self.decode(latents[: len(first)])
        except ValueError:
            back = torch.full_like(parts[0], torch.nan)
        exact = stage.decode(first).sample.clamp(-1, 1)
        if back.shape != exact.shape or not torch.allclose(back, exact, atol=SAME):
            raise ValueError(
                f"images as latents of a {self.folder.name}: it packs them, or has units that are not known here"
            )
        return latents
