"""What the families' tests of VAE decoding share."""

import numpy as np
import torch
from tpuvid.contract import Latents
from tpuvid.runs.pipeline import Pipeline


def random_latents(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape)


def latents_of(pipe: Pipeline, latents: torch.Tensor) -> Latents:
    """The latents as a file of the pipeline's model would have them."""
    return Latents(model_id=pipe.spec.model_id, tensors={"latents": latents.numpy()}, config=pipe.spec.defaults)


def chunks_of(pipe: Pipeline, latents: torch.Tensor) -> list[np.ndarray]:
    """The chunks of frames [1, n, H, W, 3] that the pipeline decodes."""
    return [chunk["frames"] for chunk in pipe.decode_chunks(latents_of(pipe, latents))]


def stock_frames(vae: torch.nn.Module, z: torch.Tensor) -> np.ndarray:
    """Frames [1, F, H, W, 3] in [0, 1] of denormalised latents, by a diffusers VAE."""
    with torch.no_grad():
        frames = vae.decode(z).sample
    return (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


def check_tiles(pipe: Pipeline, vae: torch.nn.Module, latents: torch.Tensor, z: torch.Tensor, chunks: list[int]) -> None:
    """A pipeline with ``vae_tiling`` decodes `latents` as the stock VAE with tiles decodes `z`, in chunks of so many frames."""
    vae.enable_tiling()
    expected = stock_frames(vae, z)
    found = chunks_of(pipe, latents)
    assert [c.shape[1] for c in found] == chunks
    found = np.concatenate(found, axis=1)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    vae.disable_tiling()
    assert np.abs(stock_frames(vae, z) - expected).max() > 0.01, "tiles that change nothing test nothing"
