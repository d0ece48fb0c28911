"""Models of text small enough for a test, with random weights, as folders that the real libraries read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataset_prep.encoders.torchvision_ops import mend_torchvision

WORDS = ["a", "red", "green", "blue", "tent", "lantern", "warm", "wool", "hat", "width", "##s", ",", "."]
TEXTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("tent", "lantern", "warm wool hat")]
TEXTS += ["hat", "a red wool hat, a blue wool hat, a green wool hat.", ""]


def skip_without(package: str) -> None:
    """Skip the test, unless the package is installed."""
    mend_torchvision()
    pytest.importorskip(package)


def save_bert(folder: Path, *, width: int = 16, positions: int = 32, pooler: bool = True, seed: int = 0) -> Path:
    """A BERT of two layers and its WordPiece tokenizer. Its biases are not 0, so that wrong masks show."""
    import torch

    skip_without("transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    BertTokenizerFast(vocab=vocabulary, model_max_length=positions).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=positions, initializer_range=0.5,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=pooler)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def save_sentence_model(folder: Path, *, width: int = 16, **bert: int) -> Path:
    """A sentence-transformers model of such a BERT, with the mean over tokens."""
    skip_without("sentence_transformers")
    save_bert(folder.with_name(f"{folder.name}-bert"), width=width, **bert)
    from sentence_transformers import SentenceTransformer, models

    words = models.Transformer(str(folder.with_name(f"{folder.name}-bert")))
    pooling = models.Pooling(width, pooling_mode="mean")
    SentenceTransformer(modules=[words, pooling], device="cpu").save(str(folder))
    return folder


def save_clip(folder: Path, *, width: int = 16) -> Path:
    """A CLIP of transformers, whose tokenizer knows letters only."""
    import torch

    skip_without("transformers")
    from transformers import CLIPConfig, CLIPModel

    n_tokens = len(save_clip_tokenizer(folder))
    torch.manual_seed(0)
    layers = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    texts = {**layers, "vocab_size": n_tokens, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    pictures = {**layers, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=texts, vision_config=pictures, projection_dim=width)).save_pretrained(folder)
    return folder


def save_clip_tokenizer(folder: Path) -> dict[str, int]:
    """Its vocabulary."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16).save_pretrained(folder)
    return vocabulary


def save_pipeline(folder: Path, *, width: int = 16) -> Path:
    """A Stable Diffusion pipeline that draws pictures of 16 x 16 pixels."""
    import torch

    skip_without("diffusers")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    n_tokens = len(save_clip_tokenizer(folder / "tokenizer"))
    torch.manual_seed(0)
    texts = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=n_tokens, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, eos_token_id=1, bos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(width,), layers_per_block=1, cross_attention_dim=width, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    pixels = AutoencoderKL(
        block_out_channels=(width, width), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=pixels, text_encoder=texts, tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), unet=network,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder
