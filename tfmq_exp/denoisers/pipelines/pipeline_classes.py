"""The classes of diffusers that a saved pipeline may have, by their exact names; nothing else is built."""

from tfmq_exp.denoisers.loading.scheduler_config import KINDS

# Pipeline -> the class of its denoiser.
PIPELINES = {
    "StableDiffusionPipeline": "UNet2DConditionModel",
    "StableDiffusionXLPipeline": "UNet2DConditionModel",
    "DiTPipeline": "DiTTransformer2DModel",
    "PixArtAlphaPipeline": "PixArtTransformer2DModel",
    "PixArtSigmaPipeline": "PixArtTransformer2DModel",
    "HunyuanDiTPipeline": "HunyuanDiT2DModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "FluxPipeline": "FluxTransformer2DModel",
    "Flux2KleinPipeline": "Flux2Transformer2DModel",
    "ChromaPipeline": "ChromaTransformer2DModel",
    "AuraFlowPipeline": "AuraFlowTransformer2DModel",
    "SanaPipeline": "SanaTransformer2DModel",
    "SanaSprintPipeline": "SanaTransformer2DModel",
    "Lumina2Pipeline": "Lumina2Transformer2DModel",
    "QwenImagePipeline": "QwenImageTransformer2DModel",
    "ZImagePipeline": "ZImageTransformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
    "CogVideoXPipeline": "CogVideoXTransformer3DModel",
    "LTXPipeline": "LTXVideoTransformer3DModel",
    "HunyuanVideoPipeline": "HunyuanVideoTransformer3DModel",
}
FORMER = {"Lumina2Text2ImgPipeline": "Lumina2Pipeline"}  # names in older versions of diffusers
DENOISERS = frozenset(PIPELINES.values())
AUTOENCODERS = frozenset(
    {"AutoencoderKL", "AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLWan"}
    | {f"AutoencoderKL{family}" for family in ("CogVideoX", "LTXVideo", "HunyuanVideo", "Flux2")}
)
SCHEDULERS = frozenset(
    {*KINDS, "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler", "LCMScheduler"}
    | {"EDMDPMSolverMultistepScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "SCMScheduler"}
)
