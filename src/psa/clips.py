"""A real clip's patches as attention inputs: what a video transformer's first layer would see."""

from pathlib import Path

import torch
from torch import Tensor

from .errors import PSAError, one_line
from .extras import need

CLIP = Path(__file__).parent / "data" / "clip.mp4"
"""48 frames of Big Buck Bunny, 512×256 (Blender Foundation, CC-BY 3.0)."""

PATCH = (2, 8, 8)
"""Frames, rows and columns of pixels in one token."""


def read_frames(path: str | Path = CLIP, count: int = 16, size: tuple[int, int] = (256, 512)) -> Tensor:
    """``count`` frames spread evenly over a video: uint8 [count, height, width, 3].

    Raises:
        PSAError: when the file cannot be read as a video, or has fewer frames.
    """
    av = need("av", "report")
    try:
        with av.open(str(path)) as container:
            frames = [frame for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise PSAError(f"{path}: cannot be read as a video ({one_line(error)})") from error
    if len(frames) < count:
        raise PSAError(f"{path}: {len(frames)} frames, {count} are needed")
    picked = [frames[int(i * len(frames) / count)] for i in range(count)]
    height, width = size
    arrays = [frame.reformat(width=width, height=height, format="rgb24").to_ndarray() for frame in picked]
    return torch.stack([torch.from_numpy(array) for array in arrays])


def patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames [F, H, W, 3] as standardised patches [tokens, channels] in raster order, and their grid (T, H, W)."""
    t, y, x = PATCH
    count, height, width, _ = frames.shape
    grid = (count // t, height // y, width // x)
    cut = frames[: grid[0] * t, : grid[1] * y, : grid[2] * x].float()
    cells = cut.view(grid[0], t, grid[1], y, grid[2], x, 3).permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, t * y * x * 3)
    return (cells - cells.mean(0)) / cells.std(0).clamp(min=1e-6), grid


def rotary(x: Tensor, grid: tuple[int, int, int], base: float = 1e4) -> Tensor:
    """3-D rotary position: the channels of x [..., T*H*W, D] are shared among t, y and x (24/20/20 of 64)."""
    dim = x.shape[-1]
    side = dim // 16 * 5 // 2 * 2
    shares = (dim - 2 * side, side, side)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = []
    for axis, share in zip(axes, shares, strict=True):
        frequency = base ** (-torch.arange(0, share, 2, dtype=torch.float32) / share)
        angles.append(axis.reshape(-1, 1) * frequency)
    turn = torch.cat(angles, dim=-1).to(x.device)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()), dim=-1)
    return turned.flatten(-2)


def clip_qkv(
    frames: Tensor, heads: int = 4, head_dim: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]:
    """q, k, v [1, heads, tokens, head_dim] of a clip, and its grid.

    Each head projects the patches at random; its queries resemble its keys, both are scaled to unit RMS and turned by
    3-D rotary position, and the queries of later heads are sharper (temperature 1, 1.5, 2, …).
    """
    cells, grid = patches(frames)
    g = torch.Generator().manual_seed(seed)
    channels = cells.shape[-1]

    def weights() -> Tensor:
        return torch.randn(heads, channels, head_dim, generator=g, device="cpu") / channels**0.5

    w_k, w_v = weights(), weights()
    w_q = w_k + 0.6 * weights()
    q, k, v = (cells @ w for w in (w_q, w_k, w_v))
    unit = [x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6) for x in (q, k)]
    temperature = 1.0 + 0.5 * torch.arange(heads).view(-1, 1, 1)
    q, k = rotary(unit[0], grid) * temperature, rotary(unit[1], grid)
    return q[None], k[None], v[None], grid
