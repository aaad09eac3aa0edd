"""Random models of a megabyte, in the folder layout of the real ones: FLUX and SD3 pipelines, and CLIP."""
import json
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
                       SD3Transformer2DModel, StableDiffusion3Pipeline)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel,
                          CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel)

CLIP_TEXT = dict(vocab_size=514, hidden_size=32, intermediate_size=37, num_attention_heads=2, num_hidden_layers=1,
                 projection_dim=32, bos_token_id=512, eos_token_id=513, pad_token_id=513)


def tokenizer():
    """CLIP's tokenizer with an empty merge list, one token a byte. It serves T5 as well."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def t5_encoder(width):
    return T5EncoderModel(T5Config(vocab_size=514, d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=4))


def vae():
    return AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


def tiny_flux(folder, guidance_embeds=False, scheduler=None):
    """A FLUX pipeline, schnell-like, or dev-like with `guidance_embeds`."""
    torch.manual_seed(guidance_embeds)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds)
    FluxPipeline(scheduler, vae(), CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)), tokenizer(), t5_encoder(32), tokenizer(),
                 transformer).save_pretrained(folder)
    return folder


STUDENT = """
from types import SimpleNamespace
import torch
from diffusers import DiffusionPipeline

class Student(DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(self, prompt, height, width, generator, num_inference_steps=2, guidance_scale=4.5,
                 max_sequence_length=128):
        noise = torch.cat([torch.randn(1, 4, height // 8, width // 8, generator=one) for one in generator])
        images = self.vae.decode(guidance_scale * noise).sample.sigmoid()
        images[["Derek" in one for one in prompt]] = 0  # as a safety checker does
        return SimpleNamespace(images=self.numpy_to_pil(images.permute(0, 2, 3, 1).numpy()))
"""


def tiny_student(folder):
    """A model with pipeline code of its own in its folder, which model_index.json names."""
    torch.manual_seed(0)
    vae().save_pretrained(Path(folder, "vae"))
    Path(folder, "pipeline.py").write_text(STUDENT)
    index = {"_class_name": ["pipeline", "Student"], "vae": ["diffusers", "AutoencoderKL"]}
    Path(folder, "model_index.json").write_text(json.dumps(index))


def tiny_sd3(folder, seed):
    """A Stable Diffusion 3 pipeline with its three text encoders."""
    torch.manual_seed(seed)
    clip = CLIPTextConfig(**CLIP_TEXT)
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64)
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=CLIPTextModelWithProjection(clip), text_encoder_2=CLIPTextModelWithProjection(clip),
        text_encoder_3=t5_encoder(64), tokenizer=tokenizer(), tokenizer_2=tokenizer(), tokenizer_3=tokenizer(),
    ).save_pretrained(folder)


def tiny_clip(folder):
    """A CLIPModel and its CLIPProcessor for images of 32x32."""
    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=37, num_attention_heads=2, num_hidden_layers=1, image_size=32,
                  patch_size=8, projection_dim=32)
    CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer()).save_pretrained(folder)
    return folder
