"""Tiny random models with their own tokenizers, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tr
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 24}


def tokenizer(marks: bool = True) -> Any:
    """A tokenizer of single words; with `marks`, [CLS] a [SEP] b [SEP] like BERT."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    if marks:
        made.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"] if marks else ["input_ids", "attention_mask"],
    )  # fmt: skip


def bert(labels: int = 3) -> Any:
    return tr.BertForSequenceClassification(tr.BertConfig(vocab_size=len(WORDS), num_labels=labels, **SMALL))


def llama() -> Any:
    return tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **SMALL))


def t5() -> Any:
    config = tr.T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return tr.T5ForConditionalGeneration(config)


def vit(labels: int = 3) -> Any:
    config = tr.ViTConfig(**{**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": labels})
    return tr.ViTForImageClassification(config)


def enlarge(model: Any, scale: float = 16.0) -> Any:
    """Random initialisation gives nearly constant outputs; with larger weights, outputs depend on the input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def pair(make: Any, folder: Path, change: float = 0.02, marks: bool = True, seed: int = 0) -> tuple[Path, Path]:
    """A base without head (if it can be) and a fine-tune of it, saved with a tokenizer."""
    torch.manual_seed(seed)
    fine = enlarge(make())
    body = getattr(fine, fine.base_model_prefix, fine) if fine.__class__.__name__.endswith("Classification") else fine
    body.save_pretrained(folder / "base")
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(change * torch.randn(parameter.shape, generator=noise))
    fine.save_pretrained(folder / "fine")
    for name in ("base", "fine"):
        tokenizer(marks).save_pretrained(folder / name)
    return folder / "base", folder / "fine"


def sentences(count: int, seed: int = 0, most: int = 18) -> list[str]:
    """Random sentences of 1 to `most` words."""
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (count,), generator=noise).tolist()
    return [" ".join(f"w{int(i)}" for i in torch.randint(60, (n,), generator=noise)) for n in lengths]


class Straight(torch.nn.Module):
    """Features that are linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = torch.nn.Linear(7, 5), torch.nn.Linear(5, 2)

    @property
    def base_model(self) -> torch.nn.Module:
        return self.encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.dropout(self.encoder(x), 0.5, self.training))
