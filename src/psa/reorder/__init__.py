from .permutation import Permutation
from .spatial import gilbert_order, spatial_permutation


class SemanticState:
    pass


def reorder(method, q, k, grid, *, text_length=0, text_position="last", tile_size=(2, 8, 8), state=None):
    return spatial_permutation(method, grid, text_length, text_position, tile_size, device=q.device), None
