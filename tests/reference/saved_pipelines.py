"""Small random pipelines of diffusers, saved by its own ``save_pretrained``, and one run of each by its own code."""

import json
from dataclasses import dataclass

import diffusers
import numpy as np
import torch

SIDE = 8


def unet(**config):
    """Its norms are damped: with the usual norm_eps of 1e-5, random weights blow rounding up, and diffusers' own clamped
    DDIM run in float32 differs from its run in float64 by 2e-5.
    """
    torch.manual_seed(0)
    shape = {"in_channels": 3, "out_channels": 3, "sample_size": SIDE}
    blocks = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "norm_eps": 0.1,
    }
    types = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**{**shape, **blocks, **types, **config}).eval()


def dit(**config):
    torch.manual_seed(0)
    shape = {"in_channels": 4, "out_channels": 8, "sample_size": SIDE, "patch_size": 2, "num_embeds_ada_norm": 1000}
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    return diffusers.DiTTransformer2DModel(**{**shape, **size, **config}).eval()


def vae():
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def scheduler(name="DDPMScheduler", **config):
    return getattr(diffusers, name)(**config)


def save(folder, network, process, id2label=None):
    """A whole pipeline in a folder, which is returned."""
    if isinstance(network, diffusers.UNet2DModel):
        kind = diffusers.DDPMPipeline if isinstance(process, diffusers.DDPMScheduler) else diffusers.DDIMPipeline
        pipeline = kind(network, process)
    else:
        pipeline = diffusers.DiTPipeline(network, vae(), process)
    pipeline.save_pretrained(folder)
    if id2label:  # published pipelines have it; save_pretrained leaves it out
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"id2label": id2label}))
    return folder


@dataclass(frozen=True)
class Run:
    """A whole run of diffusers.

    Attributes:
        start: (B, C, H, W) unit normal.
        noise: (steps, B, C, H, W), zero where a step draws none.
        states: (steps, B, C, H, W) after each step, variance-preserving.
    """

    start: np.ndarray
    noise: np.ndarray
    states: np.ndarray


def run(network, process, steps, labels=None, guidance_scale=1.0, guided=None, eta=None, batch=2):
    """The loop of diffusers' pipelines around its own network and ``scheduler.step``, which draws its own noise.

    Args:
        guided: how many channels guidance acts on; all that are predicted without.
    """
    channels, null = network.config.in_channels, None
    shape = (batch, channels, SIDE, SIDE)
    x = start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    drawing, noise, states = torch.Generator().manual_seed(2), [], []
    if labels is not None:
        labels = torch.tensor(labels)
        null = torch.full_like(labels, labels.new_tensor(getattr(network.config, "num_embeds_ada_norm", 0)))
    process.set_timesteps(steps)
    for t in process.timesteps:
        with torch.no_grad():
            out = call(network, x, t, labels)
            if guidance_scale != 1:
                uncond = call(network, x, t, null)
                k = guided or channels
                out[:, :k] = uncond[:, :k] + guidance_scale * (out[:, :k] - uncond[:, :k])
            if out.shape[1] != channels and getattr(process.config, "variance_type", "") != "learned_range":
                out = out[:, :channels]
            before = drawing.get_state()
            x = process.step(out, t, x, generator=drawing, **({} if eta is None else {"eta": eta})).prev_sample
        drew = not torch.equal(before, drawing.get_state())
        noise.append(torch.randn(shape, generator=torch.Generator().set_state(before)) if drew else torch.zeros(shape))
        states.append(x)
    return Run(start.numpy(), torch.stack(noise).numpy(), torch.stack(states).numpy())


def call(network, x, t, labels):
    given = {} if labels is None else {"class_labels": labels}
    return network(x, t.expand(len(x)), **given).sample.clone()
