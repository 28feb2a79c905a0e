"""Pipelines of the large text-to-image families in miniature: 16 x 16 pictures, 8 x 8 latents, 20 noise levels."""

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)


NAMES = ("xl", "xl-v", "sd3", "sd3-t5", "flux-dev", "flux-schnell", "klein")
WORDS = "zero one two three four five six seven eight nine a red green blue digit on black white 7 9".split()


def t5(words: Sequence[str] = WORDS) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    reader = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    reader.pre_tokenizer = Whitespace()
    reader.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=reader, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
    config = T5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def make(name: str, tokenizer: CLIPTokenizer, seed: int = 0) -> DiffusionPipeline:
    """One of NAMES, with random weights in eval mode."""
    torch.manual_seed(seed)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=8, **ids,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=False, shift_factor=0.3, scaling_factor=0.7,
    )  # fmt: skip
    makers = {"xl": stable_diffusion_xl, "sd3": stable_diffusion_3, "flux": flux, "klein": klein}
    pipeline = makers[name.split("-")[0]](name, vae, tokenizer, clip)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    with torch.no_grad():  # what is made zero hides much of what a model reads
        for parameter in pipeline.components.get("transformer", torch.nn.Module()).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_xl(name, vae, tokenizer, clip) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8, use_linear_projection=True,
    )  # fmt: skip
    vae.register_to_config(shift_factor=None)
    predicts = "v_prediction" if name == "xl-v" else "epsilon"
    return StableDiffusionXLPipeline(
        vae, CLIPTextModel(clip), CLIPTextModelWithProjection(clip), tokenizer, tokenizer, unet,
        EulerDiscreteScheduler(num_train_timesteps=20, steps_offset=1, prediction_type=predicts),
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(name, vae, tokenizer, clip) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip
    tokenizer_3, text_encoder_3 = t5() if name == "sd3-t5" else (None, None)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=3.0), vae,
        CLIPTextModelWithProjection(clip), tokenizer, CLIPTextModelWithProjection(clip), tokenizer, text_encoder_3,
        tokenizer_3,
    )  # fmt: skip


def flux(name, vae, tokenizer, clip) -> FluxPipeline:
    dev = name == "flux-dev"
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=8, guidance_embeds=dev, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    tokenizer_2, text_encoder_2 = t5()
    schedule = {"use_dynamic_shifting": True, "shift": 3.0} if dev else {}
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, **schedule), vae, CLIPTextModel(clip), tokenizer,
        text_encoder_2, tokenizer_2, transformer,
    )  # fmt: skip


CHAT = """{% for turn in messages %}<|im_start|>{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


def klein(name, vae, tokenizer, clip) -> Flux2KleinPipeline:
    """Its VAE has statistics of its own, and its language model, of 28 layers, has one table for tokens and head."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = []
    for word in ("user", "assistant", *(f"{space}{word}" for space in ("\u0120", "") for word in WORDS)):
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    vocabulary = dict.fromkeys([*marks, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)])
    words = Qwen2TokenizerFast(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=list(dict.fromkeys(merges)),
        eos_token="<|im_end|>", extra_special_tokens=marks[1:], model_max_length=24, chat_template=CHAT,
    )  # fmt: skip
    encoder = Qwen3Config(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    own = {name: vae.config[name] for name in ("block_out_channels", "down_block_types", "up_block_types")}
    vae = AutoencoderKLFlux2(
        **own, latent_channels=4, sample_size=16, norm_num_groups=2, mid_block_add_attention=False, layers_per_block=1
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.3, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, timestep_guidance_channels=32,
    )  # fmt: skip
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, use_dynamic_shifting=True, shift=3.0), vae,
        Qwen3ForCausalLM(encoder), words, transformer, is_distilled=name == "klein-distilled",
    )  # fmt: skip
