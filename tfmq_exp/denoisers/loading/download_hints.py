"""Publishers of the pretrained models, for the message when a file is missing."""

LDM = "the model zoo of github.com/CompVis/latent-diffusion"

# Model -> the file, and its publisher. docs/checkpoints.md has the same with mirrors.
PUBLISHED = {
    "ddim_cifar10": ("model-790000.ckpt of ema_diffusion_cifar10_model", "github.com/pesser/pytorch_diffusion"),
    "ldm_bedroom": ("model.ckpt of lsun_bedrooms.zip", LDM),
    "ldm_church": ("model.ckpt of lsun_churches.zip", LDM),
    "ldm_celebahq": ("model.ckpt of celeba.zip", f"{LDM}, as diffusers folder huggingface.co/CompVis/ldm-celebahq-256"),
    "ldm_ffhq": ("model.ckpt of ffhq.zip", LDM),
    "ldm_imagenet": ("model.ckpt of cin256-v2", LDM),
    "sd_v1_4": ("sd-v1-4.ckpt", "huggingface.co/CompVis/stable-diffusion-v-1-4-original"),
}


def where_to_find(name: str) -> str:
    """One sentence on the file of a model and its publisher."""
    if name not in PUBLISHED:
        return "give an original checkpoint or a diffusers folder; docs/checkpoints.md lists those of known models"
    file, publisher = PUBLISHED[name]
    return (
        f"expected {file}, published at {publisher}, or a diffusers folder (docs/checkpoints.md); nothing is downloaded"
    )
