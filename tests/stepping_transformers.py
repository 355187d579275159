"""Models of transformers whose tokens over a static cache are one op, and how they are run."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastshard.integrations.transformers import step


def build(family: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 200}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    window = {"sliding_window": None} if family == "mistral" else {}
    config = AutoConfig.for_model(
        family, **(sizes | heads | window | {"max_position_embeddings": 64} | changes)
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        mean, std = (0, 0.1) if parameter.dim() > 1 else (1, 0.3)
        parameter.data.normal_(mean, std)
    return model


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of the calls of the op, from here on."""
    called = []
    take = step._Step.__call__

    def counted(self, input_ids, *args):
        called.append(len(input_ids))
        return take(self, input_ids, *args)

    monkeypatch.setattr(step._Step, "__call__", counted)
    return called


def prompt(batch: int = 1, padded: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(200, (batch, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, num_tokens: int = 6, **changes):
    settings = {"cache_implementation": "static", "do_sample": False, "disable_compile": True}
    return model.generate(
        **inputs,
        **(settings | changes),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
