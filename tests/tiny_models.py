"""Random models of a megabyte, in the folder layout of the real ones: FLUX and SD3 pipelines, and CLIP."""
import json
import string
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel,
                       SD3Transformer2DModel, StableDiffusion3Pipeline)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel,
                          CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel)

CLIP_TEXT = dict(vocab_size=514, hidden_size=32, intermediate_size=37, num_attention_heads=2, num_hidden_layers=1,
                 projection_dim=32, bos_token_id=512, eos_token_id=513, pad_token_id=513)


def clip_tokenizer():
    """CLIP's tokenizer with an empty merge list: one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def t5_tokenizer():
    """A Unigram tokenizer of single characters, with T5's end of sentence."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    tokenizer = Tokenizer(models.Unigram(special + [(c, -2.0) for c in string.ascii_letters + string.digits], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=512)


def t5_encoder(width=32):
    return T5EncoderModel(T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=4))


def vae():
    return AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


def save(pipeline, folder):
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux(folder, seed=0, guidance_embeds=False, scheduler=None):
    """A FLUX pipeline, schnell-like, or dev-like with `guidance_embeds`. Same encoders and VAE for the same seed."""
    torch.manual_seed(seed)
    text, t5, autoencoder = CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)), t5_encoder(), vae()
    torch.manual_seed(seed + 1 + guidance_embeds)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds)
    if scheduler is None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True) if guidance_embeds else \
            FlowMatchEulerDiscreteScheduler(shift=1.0)
    return save(FluxPipeline(scheduler, autoencoder, text, clip_tokenizer(), t5, t5_tokenizer(), transformer), folder)


def tiny_lora(path):
    """A LoRA of rank 4 on the first attention of tiny_flux."""
    torch.manual_seed(0)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": torch.randn(4, 32), f"{layer}.lora_B.weight": torch.randn(32, 4)}, path)


STUDENT = """
from types import SimpleNamespace
import torch
from diffusers import DiffusionPipeline
from torchvision.transforms.functional import to_pil_image

class Student(DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(self, prompt, height, width, generator, num_inference_steps=2, guidance_scale=4.5):
        noise = [torch.randn(1, 4, height // 8, width // 8, generator=one) for one in generator]
        images = self.vae.decode(guidance_scale * torch.cat(noise)).sample
        return SimpleNamespace(images=[to_pil_image(image.sigmoid()) for image in images])
"""


def tiny_student(folder):
    """A model with pipeline code of its own in its folder, which model_index.json names."""
    torch.manual_seed(0)
    vae().eval().save_pretrained(Path(folder, "vae"))
    Path(folder, "pipeline.py").write_text(STUDENT)
    index = {"_class_name": ["pipeline", "Student"], "vae": ["diffusers", "AutoencoderKL"]}
    Path(folder, "model_index.json").write_text(json.dumps(index))


def tiny_sd3(folder, seed=0):
    """A Stable Diffusion 3 pipeline with its three text encoders."""
    torch.manual_seed(seed)
    clip = CLIPTextConfig(**CLIP_TEXT)
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64)
    return save(StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=CLIPTextModelWithProjection(clip), tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(64), tokenizer_3=t5_tokenizer()), folder)


def tiny_clip(folder, seed=0):
    """A CLIPModel and its CLIPProcessor for images of 32x32."""
    torch.manual_seed(seed)
    vision = dict(hidden_size=32, intermediate_size=37, num_attention_heads=2, num_hidden_layers=1, image_size=32,
                  patch_size=8, projection_dim=32)
    CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=vision, projection_dim=32)).eval().save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=clip_tokenizer()).save_pretrained(folder)
    return folder
