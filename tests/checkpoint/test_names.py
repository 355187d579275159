"""Names and row order, against torchtune's own conversion."""

import pytest
import torch
from torchtune.models.convert_weights import hf_to_tune

from fastshard.checkpoint import names

OURS = [
    "tok_embeddings.weight",
    "norm.scale",
    "output.weight",
    *(
        f"layers.{i}.{part}"
        for i in (0, 12)
        for part in (
            "sa_norm.scale",
            "mlp_norm.scale",
            "attn.q_proj.weight",
            "attn.k_proj.weight",
            "attn.v_proj.weight",
            "attn.output_proj.weight",
            "mlp.w1.weight",
            "mlp.w2.weight",
            "mlp.w3.weight",
        )
    ),
]


@pytest.mark.parametrize("name", OURS)
def test_names_are_torchtunes(name):
    theirs = names.hugging_face_name(name)
    converted = hf_to_tune({theirs: torch.zeros(8, 8)}, num_heads=2, num_kv_heads=2, dim=8)
    assert list(converted) == [name]
    assert names.is_hugging_face(theirs)
    assert not names.is_hugging_face(name)
    assert names.layer_of(theirs) == names.layer_of(name)


@pytest.mark.parametrize("shape", [(4 * 6, 5), (4 * 6,)])
def test_rotated_rows_are_torchtunes(shape):
    rows = torch.arange(24.0)[:, None].expand(24, 5) if len(shape) == 2 else torch.arange(24.0)
    target = torch.full(shape, float("nan"))
    names.copy_rotated(target, rows, head_dim=6, rotary_dim=6)
    weight = torch.arange(24.0)[:, None].expand(24, 24).contiguous()
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = hf_to_tune({name: weight}, num_heads=4, num_kv_heads=4, dim=24)
    assert torch.equal(target.reshape(24, -1)[:, 0], expected["layers.0.attn.q_proj.weight"][:, 0])


def test_dims_behind_the_rotary_ones_stay():
    target = torch.full((16, 1), float("nan"))
    names.copy_rotated(target, torch.arange(16.0)[:, None], head_dim=8, rotary_dim=4)
    assert target[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("name", "rotated"),
    [
        ("layers.1.attn.q_proj.weight", True),
        ("layers.1.attn.k_proj.bias", True),
        ("layers.1.attn.k_norm.scale", True),
        ("layers.1.attn.v_proj.weight", False),
        ("layers.1.attn.output_proj.weight", False),
        ("layers.1.mlp.w1.weight", False),
    ],
)
def test_only_rows_of_q_and_k_are_rotated(name, rotated):
    assert names.is_rotated(name) == rotated
