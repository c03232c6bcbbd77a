"""Images and video frames from files, for video understanding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PSAError, one_line
from .extras import need

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DEFAULT_FPS = 2.0
MAX_FRAMES = 768
VIDEO_PIXELS = 360 * 420
IMAGE_PIXELS = 28 * 28 * 1280

OnFrame = Callable[[int, int], None]


@dataclass(frozen=True)
class Clip:
    """Frames picked from a video.

    Attributes:
        frames: PIL images, RGB, all of one size.
        indices: their places among the ``total`` frames of the video.
        native_fps: frames per second of the video.
    """

    frames: list[Any]
    indices: list[int]
    total: int
    native_fps: float

    @property
    def fps(self) -> float:
        """Frames per second as picked."""
        return self.native_fps * len(self.frames) / max(1, self.total)


def frame_indices(total: int, native_fps: float, frames: int | None, fps: float | None, name: str) -> list[int]:
    """Which frames to take: ``frames`` spread evenly, or ``fps`` a second (default 2, at most 768 frames).

    Raises:
        PSAError: for more frames than there are.
    """
    if frames is not None and fps is not None:
        raise PSAError("--frames and --fps exclude each other; give one")
    if frames is not None and frames < 1:
        raise PSAError(f"--frames: {frames} is not a whole number from 1")
    if fps is not None and not 0 < fps <= native_fps * 1.001:
        raise PSAError(
            f"{name}: has {native_fps:g} frames per second, --fps {fps:g} asks for {'more' if fps > 0 else 'none'}"
        )
    if frames is not None and frames > total:
        raise PSAError(f"{name}: has {total} frames, --frames {frames} asks for more")
    if frames is None:
        rate = min(fps or DEFAULT_FPS, native_fps)
        frames = min(max(2, round(total / native_fps * rate)), total, MAX_FRAMES if fps is None else total)
    if frames == 1:
        return [total // 2]
    return [round(i * (total - 1) / (frames - 1)) for i in range(frames)]


@dataclass(frozen=True)
class Frames:
    """Which frames of a video to take (``wanted``), of how many (``total``), and their rate."""

    wanted: list[int]
    total: int
    rate: float


def choose_frames(path: str | Path, *, frames: int | None = None, fps: float | None = None) -> Frames:
    """The frames that :func:`read_video` takes; reads a video's index and decodes nothing.

    Raises:
        PSAError: for a file that is missing, no video or empty, and for more frames than exist.
    """
    path = Path(path)
    if path.is_dir():
        if fps is not None:
            raise PSAError(f"{path}: a folder of frames has no rate; use --frames")
        total, rate = len(image_files(path)), 1.0
        frames = min(total, MAX_FRAMES) if frames is None else frames
        return Frames(frame_indices(total, rate, frames, None, str(path)), total, rate)
    if not path.is_file():
        raise PSAError(f"{path}: no such file")
    if not path.stat().st_size:
        raise PSAError(f"{path}: the file is empty")
    av = need("av", "transformers")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise PSAError(f"{path}: holds no video")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise PSAError(f"{path}: cannot be read as a video ({one_line(error)})") from error
    if not total or not rate:
        raise PSAError(f"{path}: holds no frames")
    return Frames(frame_indices(total, rate, frames, fps, str(path)), total, rate)


def read_video(
    path: str | Path,
    *,
    frames: int | None = None,
    fps: float | None = None,
    max_pixels: int = VIDEO_PIXELS,
    on_frame: OnFrame | None = None,
) -> Clip:
    """Decodes the picked frames of a video, one after the other, each shrunk to ``max_pixels`` at once.

    Raises:
        PSAError: for a file that is missing, unreadable or empty, and for more frames than exist.
    """
    path = Path(path)
    chosen = choose_frames(path, frames=frames, fps=fps)
    wanted = chosen.wanted
    if path.is_dir():
        return _read_frame_folder(path, chosen, max_pixels)
    av = need("av", "transformers")
    picked: list[Any] = []
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for i, frame in enumerate(container.decode(video=0)):
                while len(picked) < len(wanted) and wanted[len(picked)] == i:
                    picked.append(shrink(frame.to_image(), max_pixels))
                if on_frame:
                    on_frame(i + 1, wanted[-1] + 1)
                if len(picked) == len(wanted):
                    break
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise PSAError(f"{path}: cannot be read as a video ({one_line(error)})") from error
    if not picked or (frames is not None and len(picked) < frames):
        raise PSAError(f"{path}: {len(picked)} of {len(wanted)} frames could be decoded")
    return Clip(picked, wanted[: len(picked)], chosen.total, chosen.rate)


def _read_frame_folder(folder: Path, chosen: Frames, max_pixels: int) -> Clip:
    """A folder of pictures as the frames of a video, in the order of their names, one a second."""
    files = image_files(folder)
    pictures = read_images([files[i] for i in chosen.wanted], max_pixels=max_pixels)
    size = pictures[0].size
    same = [p if p.size == size else p.resize(size) for p in pictures]
    return Clip(same, chosen.wanted, chosen.total, chosen.rate)


def image_files(folder: Path) -> list[Path]:
    """The pictures in a folder, by name; PSAError when there are none."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise PSAError(f"{folder}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return files


def read_images(paths: Sequence[str | Path], *, max_pixels: int = IMAGE_PIXELS) -> list[Any]:
    """Pictures as RGB, each shrunk to ``max_pixels``; PSAError for a file that is none."""
    image = need("PIL.Image", "transformers")
    pictures = []
    for path in paths:
        try:
            with image.open(path) as picture:
                pictures.append(shrink(picture.convert("RGB"), max_pixels))
        except FileNotFoundError as error:
            raise PSAError(f"{path}: no such file") from error
        except (OSError, ValueError) as error:
            raise PSAError(f"{path}: cannot be read as a picture") from error
    return pictures


def check_images(paths: Sequence[str | Path]) -> None:
    """PSAError for the first file that is missing or no picture; reads headers alone."""
    image = need("PIL.Image", "transformers")
    for path in paths:
        try:
            image.open(path).close()
        except FileNotFoundError as error:
            raise PSAError(f"{path}: no such file") from error
        except (OSError, ValueError) as error:
            raise PSAError(f"{path}: cannot be read as a picture") from error


def shrink(picture: Any, max_pixels: int) -> Any:
    """The picture, made smaller where it has more than ``max_pixels``."""
    width, height = picture.size
    factor = (max_pixels / (width * height)) ** 0.5
    if factor >= 1:
        return picture
    return picture.resize((max(1, int(width * factor)), max(1, int(height * factor))))
