"""Tiny pipelines of families that the goldens do not hold, built of parts of theirs, with random weights."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.helpers.pipelines import GOLDENS

SQUARE = {"height": 16, "width": 16, "num_inference_steps": 3}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "num_layers": 1}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "photo", "of", "the", "sea")
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LLM = {
    **{"vocab_size": 47, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"head_dim": 6, "intermediate_size": 16, "bos_token_id": 2, "eos_token_id": 1},
}


def randomised(network: Any, std: float = 0.1) -> Any:
    """A network whose weights are all random, for constructors set some to zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return network.eval().requires_grad_(False)


def part(kind: Any, place: str) -> Any:
    return kind.from_pretrained(GOLDENS / place, local_files_only=True)


def t5() -> dict[str, Any]:
    tokenizer = part(transformers.T5Tokenizer, "flux/tokenizer_2")
    return {"text_encoder": part(transformers.T5EncoderModel, "flux/text_encoder_2"), "tokenizer": tokenizer}


def chat_tokenizer() -> Any:
    tokenizer = part(transformers.PreTrainedTokenizerFast, "lumina2/tokenizer")
    tokenizer.chat_template = CHAT
    return tokenizer


def stage(name: str = "dit") -> Any:
    return part(diffusers.AutoencoderKL, f"{name}/vae")


def flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def chroma() -> tuple[Any, dict[str, Any]]:
    settings = {**HEADS, "num_single_layers": 1, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 20, "approximator_layers": 1}
    network = randomised(diffusers.ChromaTransformer2DModel(**settings, **approximator))
    pipeline = diffusers.ChromaPipeline(flow(use_dynamic_shifting=True), stage("flux"), **t5(), transformer=network)
    return pipeline, {**SQUARE, "max_sequence_length": 8, "negative_prompt": "dog"}


def aura_flow() -> tuple[Any, dict[str, Any]]:
    sizes = {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 16}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 14, "caption_projection_dim": 16}
    texts = {
        "text_encoder": part(transformers.UMT5EncoderModel, "wan/text_encoder"),
        "tokenizer": part(transformers.T5Tokenizer, "wan/tokenizer"),
    }
    network = randomised(diffusers.AuraFlowTransformer2DModel(**sizes, **heads))
    pipeline = diffusers.AuraFlowPipeline(**texts, vae=stage(), transformer=network, scheduler=flow(shift=1.73))
    return pipeline, {**SQUARE, "max_sequence_length": 8}


def hunyuan_dit() -> tuple[Any, dict[str, Any]]:
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    tokenizer.model_max_length = 77
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = randomised(transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes)))
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8}
    texts = {"hidden_size": 16, "cross_attention_dim": 12, "cross_attention_dim_t5": 16, "pooled_projection_dim": 9}
    network = diffusers.HunyuanDiT2DModel(**heads, **texts, num_layers=2)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    second = {f"{name}_2": value for name, value in t5().items()}
    pipeline = diffusers.HunyuanDiTPipeline(
        stage(), bert, tokenizer, randomised(network), diffusers.DDPMScheduler(), **parts, **second
    )
    return pipeline, {**SQUARE, "use_resolution_binning": False}


def sana_sprint() -> tuple[Any, dict[str, Any]]:
    sides = {side: {"block_out_channels": (8, 8), "layers_per_block": (1, 1)} for side in ("encoder", "decoder")}
    blocks = {f"{side}_{key}": value for side, settings in sides.items() for key, value in settings.items()}
    kinds = {f"{side}_block_types": "ResBlock" for side in sides}
    vae = diffusers.AutoencoderDC(latent_channels=4, upsample_block_type="interpolate", **blocks, **kinds)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    embedded = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "sample_size": 8, "patch_size": 1}
    network = randomised(diffusers.SanaTransformer2DModel(**heads, **cross, **embedded, caption_channels=12))
    texts = (chat_tokenizer(), part(transformers.Gemma2Model, "lumina2/text_encoder"))
    pipeline = diffusers.SanaSprintPipeline(*texts, randomised(vae), network, diffusers.SCMScheduler())
    plain = {"use_resolution_binning": False, "complex_human_instruction": None, "clean_caption": False}
    return pipeline, {**SQUARE, "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8, **plain}


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2}
    ups = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 12}
    network = randomised(diffusers.UNet2DConditionModel(**sizes, **blocks, **ups))
    text = (part(transformers.CLIPTextModel, "flux/text_encoder"), part(transformers.CLIPTokenizer, "flux/tokenizer"))
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipeline = diffusers.StableDiffusionPipeline(stage(), *text, network, scheduler, None, None, None, False)
    return pipeline, {**SQUARE, "negative_prompt": "dog"}


def pixart_alpha() -> tuple[Any, dict[str, Any]]:
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    texts = {"cross_attention_dim": 24, "caption_channels": 16, "sample_size": 128, "patch_size": 2}
    network = diffusers.PixArtTransformer2DModel(**heads, **texts, use_additional_conditions=True)
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    pipeline = diffusers.PixArtAlphaPipeline(**t5(), vae=stage(), transformer=randomised(network), scheduler=scheduler)
    plain = {"use_resolution_binning": False, "clean_caption": False}
    return pipeline, {**SQUARE, "max_sequence_length": 8, **plain}


def z_image() -> tuple[Any, dict[str, Any]]:
    encoder = randomised(transformers.Qwen3Model(transformers.Qwen3Config(**LLM)))
    sizes = {"in_channels": 4, "dim": 24, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    axes = {"cap_feat_dim": 12, "axes_dims": [4, 4, 4], "axes_lens": [512, 64, 64]}
    network = randomised(diffusers.ZImageTransformer2DModel(**sizes, **axes))
    scheduler = flow(use_dynamic_shifting=True)
    return diffusers.ZImagePipeline(scheduler, stage("flux"), encoder, chat_tokenizer(), network), {
        **SQUARE,
        "max_sequence_length": 8,
    }


def qwen_image() -> tuple[Any, dict[str, Any]]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 12}
    config = transformers.Qwen2_5_VLConfig(text_config={**LLM, "rope_parameters": rope}, vision_config=vision)
    encoder = randomised(transformers.Qwen2_5_VLForConditionalGeneration(config))
    units = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 1.0, 0.5, 2.0]}
    blocks = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    vae = randomised(diffusers.AutoencoderKLQwenImage(**blocks, temperal_downsample=[False, True, True], **units))
    settings = {**HEADS, "out_channels": 4, "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6)}
    network = randomised(diffusers.QwenImageTransformer2DModel(**settings))
    pipeline = diffusers.QwenImagePipeline(flow(use_dynamic_shifting=True), vae, encoder, chat_tokenizer(), network)
    return pipeline, {**SQUARE, "negative_prompt": "dog", "true_cfg_scale": 4.0}


def flux2_klein() -> tuple[Any, dict[str, Any]]:
    encoder = randomised(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLM)))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    vae = randomised(diffusers.AutoencoderKLFlux2(**blocks, **sizes))
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    axes = {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8, "joint_attention_dim": 36}
    network = randomised(diffusers.Flux2Transformer2DModel(**{**HEADS, "num_single_layers": 1, **axes}))
    scheduler = flow(use_dynamic_shifting=True)
    pipeline = diffusers.Flux2KleinPipeline(scheduler, vae, encoder, chat_tokenizer(), network)
    return pipeline, {**SQUARE, "max_sequence_length": 16, "text_encoder_out_layers": (1, 2, 3)}


FAMILIES: tuple[Callable[[], tuple[Any, dict[str, Any]]], ...] = (
    *(chroma, aura_flow, hunyuan_dit, sana_sprint, stable_diffusion),
    *(pixart_alpha, z_image, qwen_image, flux2_klein),
)
