"""Modifiers, embeddings and the toy networks, against recorded runs and closed forms."""

import math

import pytest
import torch
from recorded import Recorded, check_network, check_trace, close, names, relative_error
from torch import nn

from diffexport.errors import ShapeError
from diffexport_reference import (
    Attention,
    CondEmbedderLabel,
    ConditionalMLP,
    IdealDenoiser,
    ModelMixin,
    PredFlow,
    PredV,
    PredX0,
    Scaled,
    TimeInputMLP,
    TimestepEmbedder,
    alpha,
    get_sigma_embeds,
)


@pytest.mark.parametrize("name", names("TimeInputMLP") + names("ConditionalMLP"))
def test_mlp_as_recorded(name):
    check_network(Recorded(name))


def test_a_comparison_fails_on_one_changed_weight():
    recorded = Recorded("sd_mlp_cond_scaled_v")
    network = recorded.network()
    with torch.no_grad():
        network.net[2].weight[0, 0] += 0.1
        assert (
            relative_error(network(recorded["x"], recorded["sigma"], cond=recorded["cond"]), recorded["forward"]) > 1e-4
        )


def test_ideal_denoiser_as_recorded():
    recorded = Recorded("sd_ideal")
    model = IdealDenoiser(recorded["data"])
    assert close(model(recorded["x"], recorded["sigma"]), recorded["eps"])
    assert close(model.predict_eps(recorded["x"], recorded["sigma"].expand(5, 1)), recorded["eps"])


def test_ideal_denoiser_points_from_the_nearest_sample_at_small_sigma():
    data = [(torch.tensor([[0.0, 1.0]]), 7), (torch.tensor([[4.0, 4.0]]), 8)]
    model = IdealDenoiser(data)
    assert model.input_dims == (1, 2)
    x = torch.tensor([[[0.1, 1.2]]])
    assert torch.allclose(model(x, torch.tensor(0.1)), torch.tensor([[[1.0, 2.0]]]), atol=1e-5)


@pytest.mark.parametrize(
    ("network", "num_classes"),
    [
        (TimeInputMLP(hidden_dims=(8,)), 0),
        (ConditionalMLP(hidden_dims=(8,), num_classes=3), 3),
        (IdealDenoiser(torch.eye(4)), 0),
        (Scaled(PredV(TimeInputMLP))(dim=3, hidden_dims=(8,)), 0),
    ],
)
def test_traced_with_a_dynamic_batch(network, num_classes):
    check_trace(network, num_classes)


class Perfect(nn.Module, ModelMixin):
    """Answers what it was trained to answer, for one x0 that it knows."""

    input_dims = (3,)

    def __init__(self, x0, eps):
        super().__init__()
        self.x0, self.eps = x0, eps

    def forward(self, x, sigma, cond=None):
        return self.target(self.x0, sigma, self.eps)


@pytest.mark.parametrize("modifier", [lambda cls: cls, PredX0, PredV])
def test_a_perfect_network_gives_back_the_noise(modifier):
    x0, eps = torch.randn(4, 3), torch.randn(4, 3)
    sigma = torch.tensor([[0.05], [0.5], [2.0], [9.0]])
    model = modifier(Perfect)(x0, eps)
    assert close(model.predict_eps(model.noised(x0, sigma, eps), sigma), eps)
    assert model.get_loss(x0, sigma, eps) == 0


def test_a_perfect_flow_network_gives_the_velocity():
    x0, eps = torch.randn(4, 3), torch.randn(4, 3)
    model = PredFlow(Perfect)(x0, eps)
    sigma = torch.full((4, 1), 0.3)
    x = model.noised(x0, sigma, eps)
    velocity = model.predict_eps(x, sigma)
    assert torch.allclose(x - 0.3 * velocity, x0, atol=1e-6)


def test_scaled_sees_a_unit_variance_input():
    class Echo(nn.Module, ModelMixin):
        input_dims = (3,)

        def forward(self, x, sigma, cond=None):
            return x

    x, sigma = torch.randn(2, 3), torch.tensor([1.0, 3.0])
    assert torch.allclose(Scaled(Echo)()(x, sigma), x * alpha(sigma).sqrt()[:, None])


def test_sigma_embeds_of_every_shape():
    each = torch.tensor([0.5, 2.0, 7.0])
    embeds = get_sigma_embeds(3, each)
    assert torch.allclose(embeds[:, 0], torch.sin(0.5 * each.log()))
    assert torch.allclose(embeds[:, 1], torch.cos(0.5 * each.log()))
    assert torch.equal(get_sigma_embeds(3, each[:, None, None, None]), embeds)
    assert torch.equal(get_sigma_embeds(2, each[1]), embeds[[1, 1]])
    assert torch.allclose(get_sigma_embeds(1, each[1], log_scale=False), torch.tensor([[math.sin(1), math.cos(1)]]))


def test_timestep_embedder_survives_being_made_on_meta():
    with torch.device("meta"):
        embedder = TimestepEmbedder(8)
    assert embedder.mlp[0].weight.is_meta
    assert embedder.frequencies[0] == 1
    assert not embedder.frequencies.is_meta


def test_labels_are_dropped_in_training_only():
    embedder = CondEmbedderLabel(4, 5, dropout_prob=1.0)
    labels = torch.tensor([0, 3])
    null = embedder.eval()(torch.tensor([5, 5]))
    assert torch.equal(embedder.train()(labels), null)
    assert not torch.equal(embedder.eval()(labels), null)


@pytest.mark.parametrize("cond", [None, torch.tensor([1]), torch.tensor([[1, 2]])])
def test_labels_that_do_not_fit_the_batch_are_refused(cond):
    with pytest.raises(ShapeError, match=r"expected labels \(2,\)"):
        ConditionalMLP(hidden_dims=(4,))(torch.zeros(2, 2), torch.tensor(1.0), cond)


def test_guidance_of_nothing_is_no_guidance():
    recorded = Recorded("sd_mlp_cond_plain")
    network, x, sigma, cond = recorded.network(), recorded["x"], recorded["sigma"], recorded["cond"]
    assert torch.equal(network.predict_eps_cfg(x, sigma, cond, 0), network.predict_eps(x, sigma, cond))
    plain = TimeInputMLP(hidden_dims=(4,))
    assert torch.equal(plain.predict_eps_cfg(x, sigma, None, 3.0), plain.predict_eps(x, sigma))


def test_attention_is_softmax_of_products():
    attention = Attention(2, num_heads=3)
    x = torch.randn(2, 5, 6)
    q, k, v = attention.qkv(x).reshape(2, 5, 3, 3, 2).unbind(2)
    weights = torch.einsum("bnhk,bmhk->bhnm", q, k).div(2**0.5).softmax(-1)
    expected = attention.proj(torch.einsum("bhnm,bmhk->bnhk", weights, v).reshape(2, 5, 6))
    assert close(attention(x), expected, 1e-6)
    assert attention.qkv.bias is None


def test_rand_input_is_a_batch_of_samples():
    assert TimeInputMLP(dim=3).rand_input(4).shape == (4, 3)
