"""Which weights each scope trains, on a real UNet."""

import pytest
from diffusers import UNet2DConditionModel, UNet2DModel

from sa_diffusers.families.base import select_parameters
from sa_diffusers.families.scopes import SCOPES


@pytest.fixture(scope="module")
def unet(tiny_pipeline) -> UNet2DConditionModel:
    return tiny_pipeline().unet


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
CROSS_ATTENTION = [
    f"{name}.transformer_blocks.0.attn2.{layer}"
    for name in ("down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1",
                 "mid_block.attentions.0")
    for layer in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
]  # fmt: skip
OUTSIDE_NOXATTN = CROSS_ATTENTION + [
    f"{layer}.{kind}"
    for layer in ("conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    for kind in ("weight", "bias")
]


def test_full_is_everything(unet):
    assert select_parameters(unet, "full", SCOPES) == dict(unet.named_parameters())


def test_xattn_is_cross_attention_alone(unet):
    assert sorted(select_parameters(unet, "xattn", SCOPES)) == sorted(CROSS_ATTENTION)


def test_xattn_strict_is_its_keys_and_values(unet):
    expected = [name for name in CROSS_ATTENTION if name.endswith(("to_k.weight", "to_v.weight"))]
    assert sorted(select_parameters(unet, "xattn-strict", SCOPES)) == sorted(expected)


def test_noxattn_leaves_out_cross_attention_output_and_time_embedding(unet):
    left_out = set(dict(unet.named_parameters())) - set(select_parameters(unet, "noxattn", SCOPES))
    assert left_out == set(OUTSIDE_NOXATTN)


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.resnets.0.time_emb_proj.weight",  # its name holds "time_emb"
        f"{BLOCK}.attn1.to_out.0.weight",  # and this one's "out."
        f"{BLOCK}.norm2.weight",  # the norm before attn2
        "conv_in.weight",
    ],
)
def test_noxattn_matches_components_not_substrings(unet, name):
    assert name in select_parameters(unet, "noxattn", SCOPES)


def test_the_parameters_are_those_of_the_module(unet):
    own = dict(unet.named_parameters())
    assert all(parameter is own[name] for name, parameter in select_parameters(unet, "xattn", SCOPES).items())


def test_unknown_scope(unet):
    with pytest.raises(ValueError, match="one of full, xattn, xattn-strict, noxattn, got 'attn'"):
        select_parameters(unet, "attn", SCOPES)


def test_a_unet_without_cross_attention():
    unconditional = UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="train_scope 'xattn' selects no weight of this UNet2DModel"):
        select_parameters(unconditional, "xattn", SCOPES)
    assert select_parameters(unconditional, "noxattn", SCOPES)
