"""Pictures of what was kept and of what it cost (matplotlib, extra ``report``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .extras import need
from .plan import Plan
from .values import MAX_LEVEL

SKIPPED = "#2b2b2b"


def pyplot() -> Any:
    matplotlib = need("matplotlib", "report")
    matplotlib.use("Agg")
    return need("matplotlib.pyplot", "report")


def save(figure: Any, path: str | Path) -> Path:
    """Writes a figure to a temporary name, then renames it; closes it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial{target.suffix}")
    figure.savefig(partial, dpi=130, bbox_inches="tight")
    pyplot().close(figure)
    partial.replace(target)
    return target


def level_colours(top: int) -> tuple[Any, Any, list[str]]:
    """Colours for skipped, 1, 2, 4, … ``top``: (colormap, norm, labels); values are log2(level), -1 for skipped."""
    colors = need("matplotlib.colors", "report")
    count = top.bit_length()
    ramp = pyplot().get_cmap("viridis_r")
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
    """The key to a level map, drawn in ``axes``, or beside them where they are several."""
    place = {"ax": axes, "fraction": 0.03, "pad": 0.02} if isinstance(axes, list) else {"cax": axes}
    bar = figure.colorbar(image, ticks=range(-1, len(labels) - 1), **place)
    bar.ax.set_yticklabels(labels)
    bar.ax.tick_params(length=0)
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
    figure, axes = pyplot().subplots(1, count, figsize=(4.2 * count, 4.0), squeeze=False, constrained_layout=True)
    for head in range(count):
        image, labels = draw_level_matrix(axes[0, head], plan, head)
    _colour_bar(figure, axes[0].tolist(), image, labels)
    return save(figure, path)


def draw_reading(
    axes: Any, plan: Plan, frame: Any, time: int, grid: tuple[int, int, int], token: int, head: int
) -> None:
    """At which level one query token (a white cross, in its own frame) reads the tokens of frame ``time`` of the grid.

    frame: uint8 [height, width, 3], drawn in grey below the levels' colours.
    """
    levels = exponents(token_levels(plan, token, head)[: grid[0] * grid[1] * grid[2]]).view(grid)[time]
    cmap, norm, _ = level_colours(min(plan.block_n, MAX_LEVEL))
    height, width = frame.shape[:2]
    where = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    axes.imshow(frame.mean(-1), cmap="gray", vmin=0, vmax=255, **where)
    axes.imshow(levels.cpu().numpy(), cmap=cmap, norm=norm, alpha=0.65, **where)
    if time == token // (grid[1] * grid[2]):
        row, column = token // grid[2] % grid[1], token % grid[2]
        place = ((column + 0.5) * width / grid[2], (row + 0.5) * height / grid[1])
        axes.plot(*place, "k+", markersize=13, markeredgewidth=4.5)
        axes.plot(*place, "w+", markersize=12, markeredgewidth=2)


def draw_work(axes: Any, plan: Plan) -> None:
    """The share of dense attention's work that each level took, as bars in the levels' colours."""
    cmap, norm, labels = level_colours(min(plan.block_n, MAX_LEVEL))
    shares = plan.histogram()
    work = [100 * shares.get(1 << e, 0.0) / (1 << e) for e in range(len(labels) - 1)]
    axes.bar(labels[1:], work, color=[cmap(norm(e)) for e in range(len(work))])
    axes.set(xlabel="level (tokens averaged)", ylabel="% of dense work", title="where the work went")
    axes.spines[["top", "right"]].set_visible(False)


def demo_picture(
    path: str | Path, dense: Any, sparse: Any, plan: Plan, grid: tuple[int, int, int], title: str = ""
) -> Path:
    """The demo's page: frames of both clips (uint8 ``[frames, height, width, 3]``) and their difference, what the token
    of the first frame's most colourful spot reads in those frames, one head's level map, and where the work went."""
    columns, last, cell, gap, left, top = 6, len(dense) - 1, 1.4, 0.07, 0.3, 0.7
    tall = cell * dense.shape[1] / dense.shape[2]
    wide, high = columns * (cell + gap) - gap, 4 * (tall + gap) - gap
    size = (left + wide + 5.1, top + high + 0.5)
    shown = [round(i * last / (columns - 1)) for i in range(columns)]
    apart = abs(dense.astype("float32") - sparse.astype("float32")).mean(-1)
    colour = torch.from_numpy(dense[0]).float().amax(-1) - torch.from_numpy(dense[0]).float().amin(-1)
    token = int(torch.nn.functional.adaptive_avg_pool2d(colour[None], grid[1:]).argmax())
    with pyplot().rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = pyplot().figure(figsize=size)

        def panel(x: float, y: float, width: float, height: float) -> Any:
            """Axes at a place given in inches from the top left corner."""
            box = (x / size[0], 1 - (y + height) / size[1], width / size[0], height / size[1])
            return figure.add_axes(box)

        for row, name in enumerate(("dense", "PSA", "difference", "what + reads")):
            for column, frame in enumerate(shown):
                axes = panel(left + column * (cell + gap), top + row * (tall + gap), cell, tall)
                if row < 2:
                    axes.imshow((dense, sparse)[row][frame])
                elif row == 2:
                    axes.imshow(apart[frame], cmap="magma", vmin=0, vmax=64)
                else:
                    draw_reading(axes, plan, dense[frame], round(frame * (grid[0] - 1) / last), grid, token, head=0)
                axes.set(xticks=[], yticks=[], ylabel=name if column == 0 else "")
                axes.set_title(f"frame {frame}" if row == 0 else "")
        right, half = left + wide + 0.65, high / 2
        image, labels = draw_level_matrix(panel(right, top, 3.5, half - 0.4), plan)
        _colour_bar(figure, panel(right + 3.6, top, 0.14, half - 0.4), image, labels)
        draw_work(panel(right, top + half + 0.4, 3.5, half - 0.4), plan)
        figure.text(left / size[0], 1 - 0.25 / size[1], title, fontsize=12, va="center")
        return save(figure, path)
