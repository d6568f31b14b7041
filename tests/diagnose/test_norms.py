"""The rule of norms over a single number."""

import pytest
import torch
from torch import nn

from attnscope.diagnose.blindness import NO_STEP
from attnscope.diagnose.rules.norms import norm_over_one_feature
from tests.diagnose.probed import probed
from tests.diagnose.synthetic import run_of, steps_table
from tests.diagnose.test_axes import watched

NORMS = {"norms": 5, "over_one": 2, "sign_left": 0, "names": ["blocks.0.norm", "norm"]}


@pytest.mark.parametrize(
    ("fields", "severity", "said"),
    [
        (
            {},
            "error",
            "blocks.0.norm and 1 more of the 5 norms seen normalize over a single number: whatever comes in, the bias comes out.",
        ),
        (
            {"over_one": 1, "sign_left": 1, "names": ["norm"]},
            "warning",
            "norm of the 5 norms seen normalizes over a single number: of what comes in, only the sign is left.",
        ),
        (
            {"sign_left": 1},
            "error",
            "blocks.0.norm and 1 more of the 5 norms seen normalize over a single number: whatever",
        ),
        ({"over_one": 0}, None, ""),
    ],
)
def test_norms_over_one_number(tmp_path, fields, severity, said):
    finding = norm_over_one_feature(probed(tmp_path / "r", ("norms_over_one", NORMS | fields)))
    assert getattr(finding, "severity", None) == severity
    assert severity is None or finding.summary.startswith(said)


def test_silent_where_nothing_is_told(tmp_path):
    assert norm_over_one_feature(probed(tmp_path / "a")) is None
    assert norm_over_one_feature(probed(tmp_path / "b", steps=0)).why == NO_STEP
    assert norm_over_one_feature(run_of(tmp_path / "c", steps=steps_table([float("nan")] * 3))) is None


@pytest.mark.parametrize(
    ("norm", "shape", "severity"),
    [
        (nn.LayerNorm(1), (4, 6, 1), "error"),
        (nn.LayerNorm(2), (4, 6, 2), None),
        (nn.LayerNorm((6, 1)), (4, 6, 1), None),
        (nn.GroupNorm(6, 6), (4, 6), "error"),
        (nn.GroupNorm(3, 6), (4, 6), None),
        (nn.GroupNorm(6, 6), (4, 6, 3), None),
        (nn.RMSNorm(1), (4, 6, 1), "warning"),
        (nn.BatchNorm1d(6), (4, 6), None),
    ],
    ids=str,
)
def test_real_norms(tmp_path, norm, shape, severity):
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), norm)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    run = watched(tmp_path / "r", model, lambda model: model(x).square().mean(), steps=3)
    finding = norm_over_one_feature(run)
    assert getattr(finding, "severity", None) == severity
    assert severity is None or [each.group for each in finding.evidence] == ["1"]
