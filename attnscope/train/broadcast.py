"""One number per member beside the tensors of all members.

Shape key: M member, ... the axes of one parameter.
"""

from torch import Tensor


def fit(x_M: Tensor, like: Tensor) -> Tensor:
    """The numbers with as many axes as `like`, (M, ...), has."""
    return x_M.view(-1, *[1] * (like.dim() - 1))
