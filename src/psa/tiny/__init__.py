"""A small text-to-video model of Wan's architecture, trained on a world of moving shapes, in the box.

``psa.tiny.path()`` is a checkpoint folder for ``diffusers.WanPipeline.from_pretrained``; ``psa.tiny.scenes`` states the
grammar of its captions, ``psa.tiny.checker`` reads off what a clip shows, ``psa.tiny.train`` trains it.
"""

from pathlib import Path

WIDTH, HEIGHT, FRAMES = 128, 128, 33  # native size: 17 × 16 × 16 latents, one token each
STEPS, GUIDANCE, FPS = 12, 4.0, 12  # how its clips are sampled and shown


def path() -> Path:
    """The shipped checkpoint's folder."""
    return Path(__file__).parent / "model"
