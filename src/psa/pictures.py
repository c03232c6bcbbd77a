"""Pictures of what was kept and of what it cost (matplotlib, extra ``report``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .extras import need
from .plan import Plan
from .values import MAX_LEVEL

SKIPPED = "#2b2b2b"


def _pyplot() -> Any:
    matplotlib = need("matplotlib", "report")
    matplotlib.use("Agg")
    return need("matplotlib.pyplot", "report")


def save(figure: Any, path: str | Path) -> Path:
    """Writes a figure to a temporary name, then renames it; closes it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial{target.suffix}")
    figure.savefig(partial, dpi=130, bbox_inches="tight")
    _pyplot().close(figure)
    partial.replace(target)
    return target


def level_colours(top: int) -> tuple[Any, Any, list[str]]:
    """Colours for skipped, 1, 2, 4, … ``top``: (colormap, norm, labels); values are log2(level), -1 for skipped."""
    colors = need("matplotlib.colors", "report")
    count = top.bit_length()
    ramp = _pyplot().get_cmap("viridis_r")
    shades = [SKIPPED, *(ramp(i / max(1, count - 1)) for i in range(count))]
    bounds = [i - 1.5 for i in range(count + 2)]
    return (
        colors.ListedColormap(shades),
        colors.BoundaryNorm(bounds, count + 1),
        ["skip", *(str(1 << e) for e in range(count))],
    )


def exponents(levels: Tensor) -> Tensor:
    """log2(level), -1 for skipped blocks."""
    return torch.where(levels > 0, levels.float().clamp(min=1).log2(), -1.0)


def token_levels(plan: Plan, query_token: int, head: int = 0, batch: int = 0) -> Tensor:
    """The level at which one query token reads every key token: [Lk], in the caller's order."""
    order = plan.permutation
    position = query_token if order is None else int(_row(order.q_inverse, batch, head)[query_token])
    levels = plan.levels[batch % plan.levels.shape[0], head % plan.levels.shape[1], position // plan.block_m]
    assert plan.length_k is not None
    per_key = levels.repeat_interleave(plan.block_n)[: plan.length_k]
    if order is None:
        return per_key
    inverse = order.k_inverse
    kv_head = head if inverse.ndim == 1 else head * inverse.shape[1] // plan.levels.shape[1]
    return per_key[_row(inverse, batch, kv_head)]


def _row(order: Tensor, batch: int, head: int) -> Tensor:
    return order if order.ndim == 1 else order[batch % order.shape[0], head % order.shape[1]]


def _colour_bar(figure: Any, axes: Any, image: Any, labels: Sequence[str]) -> None:
    bar = figure.colorbar(image, ax=axes, ticks=range(-1, len(labels) - 1), fraction=0.03, pad=0.02)
    bar.ax.set_yticklabels(labels)
    bar.set_label("level (tokens averaged)")


def draw_level_matrix(axes: Any, plan: Plan, head: int = 0, batch: int = 0) -> tuple[Any, list[str]]:
    """Levels of one head as a matrix of query blocks × KV blocks; the image and the labels of its colours."""
    levels = plan.levels[batch % plan.levels.shape[0], head % plan.levels.shape[1]]
    cmap, norm, labels = level_colours(min(plan.block_n, MAX_LEVEL))
    image = axes.imshow(exponents(levels).cpu().numpy(), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_xlabel("KV block")
    axes.set_ylabel("query block")
    per_head = plan.density_per_head[batch % plan.levels.shape[0], head % plan.levels.shape[1]]
    axes.set_title(f"head {head}: density {float(per_head):.3f}")
    return image, labels


def level_matrices(plan: Plan, path: str | Path, heads: int = 4) -> Path:
    """The level maps of the first heads, side by side."""
    count = min(heads, plan.levels.shape[1])
    figure, axes = _pyplot().subplots(1, count, figsize=(4.2 * count, 4.0), squeeze=False, constrained_layout=True)
    for head in range(count):
        image, labels = draw_level_matrix(axes[0, head], plan, head)
    _colour_bar(figure, axes[0].tolist(), image, labels)
    return save(figure, path)


def draw_level_frames(
    axes: Sequence[Any], plan: Plan, frames: Tensor, grid: tuple[int, int, int], token: int, head: int
) -> Any:
    """What one query token (a red mark) reads, drawn over frames: bright = in full, dark = coarse or skipped."""
    levels = exponents(token_levels(plan, token, head)[: grid[0] * grid[1] * grid[2]]).view(grid)
    cmap, norm, labels = level_colours(min(plan.block_n, MAX_LEVEL))
    t, h, w = token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]
    height, width = frames.shape[1:3]
    for axis, time in zip(axes, torch.linspace(0, grid[0] - 1, len(axes)).round().int().tolist(), strict=True):
        axis.imshow(frames[time * frames.shape[0] // grid[0]].numpy(), extent=(0, width, height, 0))
        image = axis.imshow(
            levels[time].cpu().numpy(),
            cmap=cmap,
            norm=norm,
            alpha=0.6,
            extent=(0, width, height, 0),
            interpolation="nearest",
        )
        axis.set_title(f"frame {time}" + (" (query's)" if time == t else ""), fontsize=9)
        axis.set_axis_off()
        if time == t:
            axis.plot(
                (w + 0.5) * width / grid[2], (h + 0.5) * height / grid[1], "r+", markersize=14, markeredgewidth=2.5
            )
    return image, labels


def draw_curves(axes: Any, curves: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> None:
    """Named lines of (x, y) on a logarithmic y axis."""
    styles = ["o-", "s--", "^-.", "d:", "v-", "x--"]
    for style, (name, points) in zip(styles * 3, curves.items(), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), style, label=name, linewidth=1.8, markersize=5)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)


def demo_picture(path: str | Path, dense: Any, sparse: Any, plan: Plan, grid: tuple[int, int, int]) -> Path:
    """The demo's page: frames of both clips (uint8 ``[frames, height, width, 3]``) and their difference, what the token
    of the first frame's most colourful spot reads in those frames, and one head's level map."""
    figure = _pyplot().figure(figsize=(13.5, 9.2), constrained_layout=True)
    columns, last = 6, len(dense) - 1
    cells = figure.add_gridspec(4, columns + 3)
    shown = [round(i * last / (columns - 1)) for i in range(columns)]
    apart = abs(dense.astype("float32") - sparse.astype("float32")).mean(-1)
    rows = [("dense", dense, {}), ("PSA", sparse, {}), ("difference", apart, {"cmap": "magma", "vmin": 0, "vmax": 64})]
    for row, (name, frames, style) in enumerate(rows):
        for column, frame in enumerate(shown):
            axes = figure.add_subplot(cells[row, column])
            axes.imshow(frames[frame], **style)
            axes.set(xticks=[], yticks=[], ylabel=name if column == 0 else "")
            if row == 0:
                axes.set_title(f"frame {frame}", fontsize=9)
    colour = torch.from_numpy(dense[0]).float().amax(-1) - torch.from_numpy(dense[0]).float().amin(-1)
    spots = torch.nn.functional.adaptive_avg_pool2d(colour[None], grid[1:])[0]
    tops = [figure.add_subplot(cells[3, column]) for column in range(columns)]
    draw_level_frames(tops, plan, torch.from_numpy(dense), grid, int(spots.argmax()), head=0)
    tops[0].set_title("what + reads", fontsize=9)
    image, labels = draw_level_matrix(axes := figure.add_subplot(cells[:2, columns:]), plan)
    _colour_bar(figure, axes, image, labels)
    shares = figure.add_subplot(cells[2:, columns:])
    work = {level: share / max(level, 1) for level, share in plan.histogram().items() if level}
    shares.bar([str(level) for level in work], [value * 100 for value in work.values()], color="#3b528b")
    shares.set(xlabel="level (tokens averaged)", ylabel="% of dense attention's work", title="where the compute went")
    return save(figure, path)
