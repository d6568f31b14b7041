"""What the README promises of the default config, seed by seed: `pytest -m slow -s tests/test_claims.py` prints the table."""

import pytest
import torch

import attnscope

SEEDS = range(10)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """The suite uses one thread; this is minutes of work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def members_by_seed(path, **changes):
    """Train ten seeds as one ensemble; settings as in TOML, given to every one of them."""
    arms = [{"name": f"seed {seed}", "train": {"seed": seed}} for seed in SEEDS]
    run = attnscope.train_model({"arm": arms, **changes}, path=path)
    unigram = run.data["reference"]["unigram"]
    print(f"\n{changes or 'default'} (unigram loss {unigram:.3f})")
    for member in run.members:
        said = f"{member.name}: {member.status}, first loss {member.first_loss:.1f}, final loss {member.final_loss:.2f}"
        if member.diverged_at is not None:
            said += f", diverged at {member.diverged_at}, non-finite at {member.nonfinite_at}"
        print(said)
    return run.members, unigram


def test_unscaled_diverges_within_30_steps(tmp_path):
    members, _ = members_by_seed(tmp_path / "run", attention={"scale": "none"})
    early = [m for m in members if m.status == "diverged" and m.diverged_at < 30]
    assert len(early) >= 9


def test_scaled_trains(tmp_path):
    members, unigram = members_by_seed(tmp_path / "run")
    assert [member.status for member in members] == ["trained"] * 10
    assert all(member.final_loss < unigram for member in members)


def test_clipping_keeps_the_unscaled_finite_and_it_does_not_learn(tmp_path):
    members, _ = members_by_seed(tmp_path / "run", attention={"scale": "none"}, clip={"threshold": 1.0})
    assert all(member.nonfinite_at is None and member.final_loss > 15 for member in members)


def test_half_the_gain_lets_the_unscaled_learn(tmp_path):
    members, unigram = members_by_seed(tmp_path / "run", attention={"scale": "none"}, init={"gain": 0.5})
    assert all(member.status == "trained" and member.final_loss < unigram for member in members)
