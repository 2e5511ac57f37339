"""The networks of the zoo: how each is built, with random weights, and a small input for it.

torchvision: every network but the quantisable ones. timm: of each module one small
member (`timm.json`, made by `python tests/zoo/networks.py`). transformers: ten classes in tiny
configurations. Small ones come first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Entry = tuple[Callable[[], nn.Module], Any]  # what builds the network, what it is called with
TIMM = Path(__file__).with_name("timm.json")


def randomise(model: nn.Module) -> nn.Module:
    """Weights that are not all one and zero, so that an error shows; layer scales of some size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.2, generator=generator)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point() and tensor.numel() > 1 and is_flat(tensor):
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor), alpha=0.2)
    return model


def is_flat(tensor: torch.Tensor) -> bool:
    """All entries alike, as a norm starts."""
    return bool((tensor == tensor.flatten()[0]).all())


def image(size: int | tuple[int, int], batch: int = 1) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def torchvision_names() -> list[str]:
    from torchvision import models

    names = [n for n in models.list_models() if not n.startswith("quantized")]
    sizes = {n: next(iter(models.get_model_weights(n))).meta["num_params"] for n in names}
    return sorted(names, key=lambda name: (sizes[name], name))


def torchvision_entry(name: str) -> Entry:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    example: Any = image({"inception_v3": 299, "maxvit_t": 224}.get(name, 64))
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if "rcnn" in name or name.startswith(("retinanet", "ssd", "fcos")):
        options["weights_backbone"] = None
        # Boxes whatever their scores, or nothing comes out with random weights.
        options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
        if not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 128}
        example = ([image(96)[0]],)
    elif name.startswith(("fcn", "deeplab", "lraspp")):
        options["weights_backbone"] = None
    elif name.startswith("raft"):
        example = (image(128), image(128) + 0.1)
    elif name.startswith(("mvit", "r3d", "mc3", "r2plus1d", "s3d", "swin3d")):
        size = 224 if name.startswith(("mvit", "s3d")) else 64
        example = torch.stack([image(size) for _ in range(16)], 2)
    elif name.startswith("vit"):
        options["image_size"] = size = 2 * int(name.split("_")[-1])
        example = image(size)
    return lambda: models.get_model(name, **options), example


def timm_names() -> list[str]:
    return sorted((row["name"] for row in json.loads(TIMM.read_text())), key=promise)


def timm_entry(name: str) -> Entry:
    import timm

    size = timm.get_pretrained_cfg(name).input_size
    example: Any = image(size[1:]) if size[0] == 3 else torch.randn(1, *size)
    return lambda: timm.create_model(name, pretrained=False), example


class Logits(nn.Module):
    """Of all that a model of transformers gives back, what the task needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs).logits
        return logits


def transformers_names() -> list[str]:
    return [
        "bert",
        "distilbert",
        "gpt2",
        "llama",
        "mistral",
        "qwen2",
        "t5",
        "vit",
        "wav2vec2",
        "whisper",
    ]


def transformers_entry(name: str) -> Entry:
    import transformers as hf

    usual = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, "vocab_size": 99}
    shared = usual | {"num_key_value_heads": 2}
    words = {"input_ids": torch.arange(14).reshape(2, 7)}
    pixels = {"pixel_values": image(32)}
    d_model = {"d_model": 64, "vocab_size": 99}
    t5 = d_model | {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    whisper = d_model | {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    whisper |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    whisper |= {f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")}
    whisper |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_mel_bins": 8}
    whisper |= {"decoder_start_token_id": 1, "max_source_positions": 20}
    wave = usual | {"conv_dim": (32, 32), "conv_kernel": (8, 4), "conv_stride": (4, 2)}
    wave |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
    wave |= {"num_conv_pos_embedding_groups": 4}
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    distil = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 99}
    both = words | {"decoder_input_ids": torch.arange(10).reshape(2, 5)}
    sound = {"input_features": torch.randn(1, 8, 40)}
    sound["decoder_input_ids"] = torch.arange(5).reshape(1, 5)
    table: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
        "bert": (hf.BertForSequenceClassification, hf.BertConfig, usual, words),
        "distilbert": (
            hf.DistilBertForSequenceClassification,
            hf.DistilBertConfig,
            distil,
            words,
        ),
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, gpt2, words),
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, shared, words),
        "mistral": (hf.MistralForCausalLM, hf.MistralConfig, shared, words),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, shared, words),
        "t5": (hf.T5ForConditionalGeneration, hf.T5Config, t5, both),
        "vit": (
            hf.ViTForImageClassification,
            hf.ViTConfig,
            usual | {"image_size": 32, "patch_size": 8},
            pixels,
        ),
        "wav2vec2": (
            hf.Wav2Vec2ForSequenceClassification,
            hf.Wav2Vec2Config,
            wave,
            {"input_values": torch.randn(1, 800)},
        ),
        "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig, whisper, sound),
    }
    kind, config, options, example = table[name]
    return lambda: Logits(kind(config(**options, use_cache=False))), example


FAMILIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Entry]]] = {
    "torchvision": (torchvision_names, torchvision_entry),
    "timm": (timm_names, timm_entry),
    "transformers": (transformers_names, transformers_entry),
}


SIZES = "test zepto atto femto pico nano xxtiny xxt xxs xt xs tiny ti t mini micro lite small s"


def promise(name: str) -> tuple[int, int, int, str]:
    """A key that puts first the names that promise a small network."""
    words = re.findall(r"[a-z]+|\d+", name)
    ranks = [SIZES.split().index(word) for word in words if word in SIZES.split()]
    numbers = [int(word) for word in words if word.isdigit() and int(word) not in (8, 16, 224)]
    return min(ranks, default=99), min(numbers, default=99), len(name), name


def pick_timm() -> list[dict[str, str]]:
    """Of each module of timm the network whose name promises the smallest."""
    import timm

    names = {module: timm.list_models(module=module) for module in timm.list_modules()}
    return [{"module": m, "name": min(n, key=promise)} for m, n in names.items() if n]


if __name__ == "__main__":
    TIMM.write_text(json.dumps(pick_timm(), indent=1) + "\n")
