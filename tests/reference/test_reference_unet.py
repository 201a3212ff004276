"""The U-Net against recorded runs of smalldiffusion, and what it refuses."""

import pytest
import torch
from recorded import Recorded, check_network, check_trace, names

from diffexport.errors import SpecError
from diffexport_reference import CondEmbedderLabel, Unet
from diffexport_reference.unet import ResnetBlock

SMALL = {
    "in_dim": 8,
    "in_ch": 2,
    "out_ch": 2,
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
}


@pytest.mark.parametrize("name", names("Unet"))
def test_unet_as_recorded(name):
    check_network(Recorded(name))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_traced_with_a_dynamic_batch(num_classes):
    check_trace(Unet(**SMALL, cond_embed=CondEmbedderLabel(128, num_classes) if num_classes else None), num_classes)


def test_sides_and_attention_of_the_default_size():
    with torch.device("meta"):
        network = Unet(32, 3, 3)
        out = network(torch.empty(2, 3, 32, 32), torch.empty(2))
    assert out.shape == (2, 3, 32, 32)
    with_attention = [len(level.blocks[0]) == 2 for level in network.downs]
    assert with_attention == [False, True, False, False]


def test_resampling_without_convolutions_has_no_weights():
    network = Unet(**SMALL, resamp_with_conv=False)
    assert network(torch.zeros(1, 2, 8, 8), torch.tensor(1.0)).shape == (1, 2, 8, 8)
    assert not [name for name in network.state_dict() if "sample" in name]


def test_shortcut_is_a_3x3_convolution_where_asked():
    block = ResnetBlock(32, 64, 16, conv_shortcut=True)
    assert block.shortcut.weight.shape == (64, 32, 3, 3)
    assert block(torch.zeros(1, 32, 4, 4), torch.zeros(1, 16)).shape == (1, 64, 4, 4)


@pytest.mark.parametrize("side", [7, 10, 20, 0])
def test_an_odd_side_is_refused_when_the_model_is_made(side):
    with pytest.raises(SpecError, match=rf"image side {side}: .* halves it 3 times, .* multiple of 8"):
        Unet(side, 3, 3)


def test_a_width_that_has_no_groups_is_refused():
    with pytest.raises(SpecError, match=r"ch 48 .* multiple of 32"):
        Unet(8, 3, 3, ch=48, ch_mult=(1,))
