"""One transformer with a leading member axis. Reading order: transformer, attention, masks, position, initialization."""

from attnscope.model.attention import BACKENDS, AttentionInputs
from attnscope.model.initialization import QKV, apart, attn_scales, initial_parameters
from attnscope.model.transformer import Geometry, Observer, forward, geometry_of

__all__ = [
    "BACKENDS",
    "QKV",
    "AttentionInputs",
    "Geometry",
    "Observer",
    "apart",
    "attn_scales",
    "forward",
    "geometry_of",
    "initial_parameters",
]
