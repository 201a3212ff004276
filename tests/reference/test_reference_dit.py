"""The DiT against recorded runs of smalldiffusion, and what its design promises."""

import pytest
import torch
from recorded import Recorded, check_network, check_trace, close, names

from diffexport.errors import ShapeError, SpecError
from diffexport_reference import CondEmbedderLabel, DiT, TimestepEmbedder
from diffexport_reference.dit import position_embedding, unpatchify

SMALL = {"in_dim": 8, "channels": 2, "patch_size": 2, "depth": 2, "head_dim": 8, "num_heads": 2}


@pytest.mark.parametrize("name", names("DiT"))
def test_dit_as_recorded(name):
    check_network(Recorded(name))


def test_position_embedding_as_recorded():
    recorded = Recorded("sd_dit_plain")
    assert close(position_embedding(4, 48), recorded.network().pos_embed, 1e-6)
    assert close(DiT(8, 3, 2, 1, 16, 3).pos_embed, recorded.network().pos_embed, 1e-6)


def test_position_embedding_columns_are_x_then_y():
    grid = position_embedding(3, 8).reshape(3, 3, 8)
    assert torch.equal(grid[0, :, :4], grid[2, :, :4])
    assert torch.equal(grid[:, 0, 4:], grid[:, 2, 4:])
    assert torch.allclose(grid[1, 2, 0], torch.tensor(2.0).sin())
    assert torch.allclose(grid[1, 2, 6], torch.tensor(1.0).cos())


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("timestep", [False, True])
def test_traced_with_a_dynamic_batch(num_classes, timestep):
    network = DiT(
        **SMALL,
        sig_embed=TimestepEmbedder(16) if timestep else None,
        cond_embed=CondEmbedderLabel(16, num_classes) if num_classes else None,
    )
    torch.nn.init.normal_(network.final_linear.weight)
    check_trace(network, num_classes)


def test_starts_as_the_identity():
    torch.manual_seed(0)
    network = DiT(**SMALL, cond_embed=CondEmbedderLabel(16, 3))
    x, sigma, labels = torch.randn(2, 2, 8, 8), torch.tensor(0.5), torch.tensor([0, 1])
    assert torch.count_nonzero(network(x, sigma, labels)) == 0
    tokens, y = torch.randn(2, 16, 16), torch.randn(2, 16)
    assert torch.equal(network.blocks(tokens, y), tokens)
    for name, weight in network.named_parameters():
        zero = "modulation" in name or name.startswith("final_linear") or name.endswith("bias")
        assert (torch.count_nonzero(weight) == 0) == zero, name


def test_initial_weights_are_xavier_and_small_for_sigma():
    torch.manual_seed(0)
    network = DiT(in_dim=8, channels=3, depth=1, head_dim=64, num_heads=2)
    patch = network.x_embed.proj.weight
    bound = (6 / (3 * 4 + 128)) ** 0.5
    assert patch.abs().max() <= bound
    assert patch.abs().max() > 0.95 * bound
    assert network.sig_embed.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_unpatchify_undoes_patches():
    images = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6)
    tokens = images.reshape(2, 3, 3, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 9, 12)
    assert torch.equal(unpatchify(tokens, 3, 2), images)


@pytest.mark.parametrize(
    ("changed", "message"), [({"in_dim": 9}, "not a multiple of the patch side 2"), ({"head_dim": 5}, "multiple of 4")]
)
def test_impossible_sizes_are_refused(changed, message):
    with pytest.raises(SpecError, match=message):
        DiT(**{**SMALL, **changed})


def test_a_network_with_labels_asks_for_them():
    with pytest.raises(ShapeError, match="cond: got none"):
        DiT(**SMALL, cond_embed=CondEmbedderLabel(16, 3))(torch.zeros(1, 2, 8, 8), torch.tensor(1.0))
