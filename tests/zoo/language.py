"""The zoo's classes of transformers, each in a tiny configuration with random weights.

The ten of the first block were chosen before anything was measured; the others came later. Most
are models of language, some see or hear, and the last four are mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Options = dict[str, Any]  # of a configuration


class Logits(nn.Module):
    """Of all that a model of transformers gives back, what the task needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        made = self.model(**inputs)
        logits: torch.Tensor = made.logits if "logits" in made else made.logits_per_image
        return logits


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def both(**options: int) -> Options:
    """The same of the encoder and of the decoder."""
    return {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in options.items()}


VOCABULARY = {"vocab_size": 99}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
BODY = DEPTH | {"hidden_size": 64, "intermediate_size": 96}
USUAL = BODY | VOCABULARY
SHARED = USUAL | {"num_key_value_heads": 2}  # two heads of queries to one of keys and values
WIDE = SHARED | {"head_dim": 16}
SMALL = {"embedding_size": 32}  # of words, narrower than the network
GPT = VOCABULARY | {"n_layer": 2, "n_head": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
D_MODEL = VOCABULARY | {"d_model": 64}
PAIR = D_MODEL | TOKENS | both(layers=2, attention_heads=4, ffn_dim=96)
PAIR |= {"decoder_start_token_id": 1}
SEEING = {"image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "patch_size": 2, "window_size": 4}
STAGES: Options = {"depths": [2, 2]}
DISTIL = VOCABULARY | {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
T5 = D_MODEL | {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
WAVE = USUAL | {"conv_dim": (32, 32), "conv_kernel": (8, 4), "conv_stride": (4, 2)}
WAVE |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
WAVE |= {"num_conv_pos_embedding_groups": 4}
APART = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}  # words and places
APART |= {"position_buckets": 8, "max_position_embeddings": 32}
TOWERS: Options = {"text_config": USUAL | TOKENS | {"max_position_embeddings": 16}}
TOWERS |= {"vision_config": BODY | SEEING, "projection_dim": 32}
CHOICE = {"num_experts_per_tok": 2}
LATENT = USUAL | {"q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
THIN = {"moe_intermediate_size": 32}

WORDS = {"input_ids": torch.arange(14).reshape(2, 7)}
TEXTS = WORDS | {"decoder_input_ids": torch.arange(10).reshape(2, 5)}
PIXELS = {"pixel_values": noise(1, 3, 32, 32)}
WAVES = {"input_values": noise(1, 800)}
SOUND = {"input_features": noise(1, 8, 40), "decoder_input_ids": torch.arange(5).reshape(1, 5)}

WRITE, TRANSLATE = "ForCausalLM", "ForConditionalGeneration"
FILL, TELL, SEE = "ForMaskedLM", "ForSequenceClassification", "ForImageClassification"

# The stem of the class, its task, the configuration, and what it is called with.
TABLE: dict[str, tuple[str, str, Options, dict[str, torch.Tensor]]] = {
    "bert": ("Bert", TELL, USUAL, WORDS),
    "distilbert": ("DistilBert", TELL, DISTIL, WORDS),
    "gpt2": ("GPT2", "LMHeadModel", GPT | {"n_embd": 64}, WORDS),
    "llama": ("Llama", WRITE, SHARED, WORDS),
    "mistral": ("Mistral", WRITE, SHARED, WORDS),
    "qwen2": ("Qwen2", WRITE, SHARED, WORDS),
    "t5": ("T5", TRANSLATE, T5, TEXTS),
    "vit": ("ViT", SEE, USUAL | SEEING, PIXELS),
    "wav2vec2": ("Wav2Vec2", TELL, WAVE, WAVES),
    "whisper": (
        "Whisper",
        TRANSLATE,
        PAIR | {"num_mel_bins": 8, "max_source_positions": 20},
        SOUND,
    ),
    # The ten end here.
    "roberta": ("Roberta", FILL, USUAL, WORDS),
    "albert": ("Albert", FILL, USUAL | SMALL, WORDS),
    "electra": ("Electra", FILL, USUAL | SMALL, WORDS),
    "deberta_v2": ("DebertaV2", FILL, USUAL | APART, WORDS),
    "modernbert": (
        "ModernBert",
        FILL,
        USUAL | TOKENS | {"cls_token_id": 1, "sep_token_id": 2},
        WORDS,
    ),
    "opt": (
        "OPT",
        WRITE,
        DEPTH | VOCABULARY | {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
        WORDS,
    ),
    "bloom": ("Bloom", WRITE, GPT | {"hidden_size": 64}, WORDS),
    "gpt_neox": ("GPTNeoX", WRITE, USUAL, WORDS),
    "falcon": ("Falcon", WRITE, DEPTH | VOCABULARY | {"hidden_size": 64}, WORDS),
    "gemma2": ("Gemma2", WRITE, WIDE, WORDS),
    "qwen3": ("Qwen3", WRITE, WIDE, WORDS),
    "phi3": ("Phi3", WRITE, USUAL | {"pad_token_id": 0}, WORDS),
    "olmo2": ("Olmo2", WRITE, USUAL, WORDS),
    "cohere": ("Cohere", WRITE, SHARED, WORDS),
    "mamba": (
        "Mamba",
        WRITE,
        VOCABULARY | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        WORDS,
    ),
    "bart": ("Bart", TRANSLATE, PAIR, TEXTS),
    "marian": ("Marian", "MTModel", PAIR, TEXTS),
    "deit": ("DeiT", SEE, BODY | SEEING, PIXELS),
    "swin": ("Swin", SEE, WINDOWS | STAGES | {"embed_dim": 16, "num_heads": [2, 4]}, PIXELS),
    "convnext": ("ConvNext", SEE, STAGES | {"hidden_sizes": [16, 32], "num_stages": 2}, PIXELS),
    "dinov2": ("Dinov2", SEE, DEPTH | SEEING | {"hidden_size": 64}, PIXELS),
    "clip": ("CLIP", "Model", TOWERS, WORDS | PIXELS),
    "mixtral": ("Mixtral", WRITE, SHARED | CHOICE | {"num_local_experts": 4}, WORDS),
    "qwen3_moe": ("Qwen3Moe", WRITE, WIDE | CHOICE | THIN | {"num_experts": 4}, WORDS),
    "gpt_oss": ("GptOss", WRITE, WIDE | CHOICE | {"num_local_experts": 4}, WORDS),
    "deepseek_v3": ("DeepseekV3", WRITE, LATENT | ROUTED | CHOICE | THIN, WORDS),
}


def transformers_names() -> list[str]:
    return list(TABLE)


def transformers_entry(name: str) -> tuple[Callable[[], nn.Module], Any]:
    import transformers as hf

    stem, task, options, example = TABLE[name]
    kind, config = getattr(hf, f"{stem}{task}"), getattr(hf, f"{stem}Config")
    return lambda: Logits(kind(config(**options, use_cache=False))), example
