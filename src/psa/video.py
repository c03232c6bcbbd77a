"""Videos as files, and how alike two of them are."""

from pathlib import Path
from typing import Any

import numpy as np

from .errors import PSAError, one_line
from .extras import need


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Writes uint8 frames [F, H, W, 3] as H.264, to a temporary name first, then renamed."""
    av = need("av", "diffusers")
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    with av.open(str(partial), mode="w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)


def read_video(path: Path) -> np.ndarray:
    """All frames of a video: uint8 [F, H, W, 3]."""
    av = need("av", "diffusers")
    try:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise PSAError(f"{path}: cannot be read as a video ({one_line(error)})") from error


def to_uint8(frames: Any) -> np.ndarray:
    """A pipeline's frames, float [F, H, W, 3] in [0, 1], as uint8.

    Raises:
        PSAError: for values that are not finite, which would be written as black.
    """
    frames = np.asarray(frames)
    if not np.isfinite(frames).all():
        raise PSAError("the video has values that are not finite; try --dtype bfloat16 or float32, and a float32 VAE")
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def likeness(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """PSNR (dB, at most 100) and SSIM of uint8 [F, H, W, 3]; LPIPS (AlexNet) where its weights can be had."""
    metrics = need("skimage.metrics", "report")
    pairs = list(zip(a, b, strict=True))
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    found = {
        "psnr": min(100.0, float(10 * np.log10(255**2 / max(error, 1e-9)))),
        "ssim": float(np.mean([metrics.structural_similarity(x, y, channel_axis=-1) for x, y in pairs])),
    }
    distance = _lpips(a, b)
    return found if distance is None else {**found, "lpips": distance}


def _lpips(a: np.ndarray, b: np.ndarray) -> float | None:
    try:
        import lpips
        import torch

        model = lpips.LPIPS(net="alex", verbose=False)
    except Exception:  # not installed, or its backbone cannot be downloaded: the other two metrics stand alone
        return None
    with torch.no_grad():
        x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (a, b))
        return float(torch.cat([model(f, g) for f, g in zip(x.split(4), y.split(4), strict=True)]).mean())
