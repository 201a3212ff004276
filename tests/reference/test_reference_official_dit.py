"""The official DiT against recorded runs of facebookresearch/DiT."""

import pytest
import torch
from recorded import Recorded, check_trace, close, names

from diffexport_reference.official_dit import DiT, OfficialDiT

SMALL = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize("name", names("official DiT"))
def test_official_dit_as_recorded(name):
    recorded = Recorded(name)
    network, x, y = recorded.network(), recorded["x"], recorded["y"]
    with torch.no_grad():
        assert close(network(x, recorded["t"], y), recorded["forward"])
        null = torch.full_like(y, recorded.case["num_classes"])
        guided = network.forward_with_cfg(
            torch.cat([x, x]), recorded["cfg4.t"], torch.cat([y, null]), recorded.case["cfg_scale"]
        )
    assert close(guided, recorded["cfg4.forward_with_cfg"])


def test_sizes_of_the_published_model():
    assert DiT is OfficialDiT
    with torch.device("meta"):
        network = DiT()
    assert network.input_dims == (4, 32, 32)
    assert network.final_layer.linear.weight.shape == (2 * 2 * 8, 1152)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 675
    assert network.y_embedder.embedding_table.weight.shape == (1001, 1152)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_traced_with_a_dynamic_batch(learn_sigma):
    network = OfficialDiT(**SMALL, learn_sigma=learn_sigma)
    torch.nn.init.normal_(network.final_layer.linear.weight)
    check_trace(network, 3)


def test_starts_as_the_identity():
    network = OfficialDiT(**SMALL)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    assert torch.count_nonzero(network(x, t, y)) == 0
    tokens = torch.randn(2, 16, 16)
    assert torch.equal(network.blocks[1](tokens, torch.randn(2, 16)), tokens)


def test_steps_of_every_shape_and_no_label():
    network = OfficialDiT(**SMALL).eval()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    x, null = torch.randn(2, 4, 8, 8), torch.full((2,), 3)
    expected = network(x, torch.tensor([40, 40]), null)
    assert torch.equal(network(x, torch.tensor(40.0)), expected)
    assert torch.equal(network(x, torch.tensor([40, 40])[:, None, None, None], null), expected)


def test_labels_are_dropped_in_training_only():
    network = OfficialDiT(**SMALL, class_dropout_prob=1.0)
    embedder, labels = network.y_embedder, torch.tensor([0, 1])
    null = embedder.eval()(torch.tensor([3, 3]))
    assert torch.equal(embedder.train()(labels), null)
    assert not torch.equal(embedder.eval()(labels), null)
    assert len(OfficialDiT(**SMALL, class_dropout_prob=0.0).y_embedder.embedding_table.weight) == 3
