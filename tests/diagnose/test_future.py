"""Rules for language models that see what they are to predict, or predict other tokens than the next ones."""

import pytest
import torch.nn.functional as F

import attnscope
from attnscope.diagnose import NotLooked, diagnose
from attnscope.diagnose.blindness import NO_STEP
from attnscope.diagnose.rules.future import (
    FEWEST_TARGETS,
    NEARLY_ALL,
    NEXT_TOKEN,
    NO_TARGETS,
    NO_TOKENS,
    OTHERWISE,
    SAME_TOKEN,
    SOME_ATTENTION,
    UNLIKE,
    future_visible,
    labels_shifted_wrong,
)
from tests.diagnose.probed import SIGHT, TARGETS, probed
from tests.diagnose.synthetic import run_of, steps_table
from tests.watch.test_probes import TEXT, Decoder, train

OPEN = SIGHT | {"later": 0.45, "later_rows": 1.0}
NOTHING = {"positions": 0, "compared": 0} | {name: None for name in TARGETS if name.startswith("equal_")}
GOLDEN = (
    "The targets are the inputs shifted by one (100% of 128 at step 0), and in 1 of 1 attention layers queries see what comes after "
    "them: in attention layer 0 (attn) they give 0.45 of their attention to later keys, where a causal mask leaves nothing."
)


def sight(layer=0, **fields):
    return "keys_seen", SIGHT | {"layer": layer} | fields


def seen(layer=0, **fields):
    return "keys_seen", OPEN | {"layer": layer} | fields


def targets(**equal):
    return "targets", TARGETS | {f"equal_{which}": share for which, share in equal.items()}


def test_a_decoder_that_sees_later_keys_is_an_error_with_layer_and_numbers(tmp_path):
    found = future_visible(probed(tmp_path / "r", seen(), ("targets", TARGETS)))
    assert (found.severity, found.kind, found.step) == ("error", "cause", 0)
    assert found.summary == GOLDEN
    (evidence,) = found.evidence
    assert (evidence.layer, evidence.value, evidence.threshold) == (0, 0.45, SOME_ATTENTION)
    assert "loss_too_low" in found.explains
    assert future_visible(probed(tmp_path / "s", sight(), ("targets", TARGETS))) is None


@pytest.mark.parametrize(
    ("fields", "is_found"),
    [
        ({"later": SOME_ATTENTION}, True),
        ({"later": SOME_ATTENTION * 0.99}, False),
        ({"later_rows": NEARLY_ALL}, True),
        ({"later_rows": NEARLY_ALL - 0.01}, False),  # a prefix that may be read both ways
        ({"keys": 15}, False),
        ({"queries": 20, "keys": 20}, False),
    ],
)
def test_what_counts_as_seeing_the_future(tmp_path, fields, is_found):
    found = future_visible(probed(tmp_path / "r", seen(**fields), ("targets", TARGETS)))
    assert (getattr(found, "severity", None) == "error") is is_found


@pytest.mark.parametrize(
    ("equal", "is_found"),
    [
        ({"next": SAME_TOKEN, "after_next": OTHERWISE}, True),
        ({"next": SAME_TOKEN - 0.01, "after_next": OTHERWISE}, False),
        ({"next": NEXT_TOKEN, "same": UNLIKE}, True),  # packed documents
        ({"next": NEXT_TOKEN, "same": UNLIKE + 0.01}, False),
        ({"next": NEXT_TOKEN - 0.01}, False),
        ({"same": OTHERWISE}, True),
        ({"same": OTHERWISE + 0.01}, False),  # a text of one symbol
    ],
)
def test_what_counts_as_the_next_tokens(tmp_path, equal, is_found):
    found = future_visible(probed(tmp_path / "r", seen(), targets(**equal)))
    assert (getattr(found, "severity", None) == "error") is is_found


def test_few_targets_tell_nothing(tmp_path):
    few = ("targets", TARGETS | {"compared": FEWEST_TARGETS - 1})
    assert future_visible(probed(tmp_path / "r", seen(), few)) is None


def test_masked_language_models_and_classifiers_may_see_everything(tmp_path):
    assert diagnose(probed(tmp_path / "mlm", seen(), targets(same=0.87, next=0.1))) == ()
    assert diagnose(probed(tmp_path / "cls", seen(), ("targets", TARGETS | NOTHING))) == ()


def test_one_layer_of_a_stack_that_sees_the_future_is_found_and_an_encoder_beside_it_is_not(tmp_path):
    names = ("h.0.attn", "h.1.attn", "encoder.attn", "h.0.cross")
    others = (seen(2), seen(3))
    run = probed(tmp_path / "leak", sight(0), seen(1), *others, ("targets", TARGETS), attention=names)
    assert [each.layer for each in future_visible(run).evidence] == [1]
    run = probed(tmp_path / "sound", sight(0), sight(1), *others, ("targets", TARGETS), attention=names)
    assert future_visible(run) is None
    two = ("targets", TARGETS | {"sequences": 2})
    run = probed(tmp_path / "two", sight(0), seen(1), *others, two, attention=names)
    assert future_visible(run) is None, "of two sequences of tokens, one may be an encoder's"
    run = probed(tmp_path / "all", seen(0), seen(1), *others, two, attention=names)
    assert len(future_visible(run).evidence) == 4


@pytest.mark.parametrize(
    ("equal", "severity", "said"),
    [
        ({"same": 1.0, "next": 0.1}, "error", "the inputs themselves, at the same positions"),
        ({"before": 0.99, "next": 0.1}, "error", "the inputs one position before"),
        ({"after_next": SAME_TOKEN, "next": 0.1}, "warning", "they were shifted twice"),
        ({"after_next": SAME_TOKEN - 0.01, "next": 0.1}, None, ""),
        ({"after_next": 1.0, "same": 1.0, "next": 0.1}, None, ""),  # a text that repeats
        ({"after_next": 1.0, "next": 1.0}, None, ""),
        ({"next": 0.1}, None, ""),
    ],
)
def test_targets_that_are_other_tokens(tmp_path, equal, severity, said):
    found = labels_shifted_wrong(probed(tmp_path / "r", sight(), targets(**equal)))
    assert getattr(found, "severity", None) == severity
    if severity:
        assert said in found.summary and "of 128 targets" in found.summary


def test_labels_are_not_shifted_wrong_beside_a_loss_of_the_next_tokens_or_without_a_causal_mask(tmp_path):
    wrong = targets(same=1.0, next=0.1)
    assert labels_shifted_wrong(probed(tmp_path / "a", seen(), wrong)) is None, "an autoencoder"
    more = targets(after_next=1.0, next=0.1)
    assert labels_shifted_wrong(probed(tmp_path / "b", sight(), more, ("targets", TARGETS))) is None


def test_who_could_not_look_says_why(tmp_path):
    for rule in (future_visible, labels_shifted_wrong):
        place = tmp_path / rule.__name__
        assert rule(probed(place / "a", seen())).why == NO_TARGETS
        nothing = ("targets", TARGETS | NOTHING | {"sequences": 0})
        assert rule(probed(place / "b", seen(), nothing)).why == NO_TOKENS
        other = rule(probed(place / "c", seen(keys=99), ("targets", TARGETS)))
        assert other.why == "no attention over the 16 positions of the tokens was measured in training"
        assert rule(probed(place / "d", steps=0, attention=())).why == NO_STEP


def test_one_rank_that_could_not_look_does_not_hide_the_other(tmp_path):
    run = probed(tmp_path / "r", seen(), ("targets", TARGETS), n_members=2)
    found = future_visible(run)
    assert found.members == ("rank 0",) and found.also[0].members == ("rank 1",)
    assert isinstance(found.also[0], NotLooked)


def test_decoders_of_this_lab_without_a_mask_and_with_one(tmp_path):
    arms = [{"name": n, "attention": {"mask": n}} for n in ("none", "causal")]
    config = {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 1, "seq_len": 8},
        "train": {"steps": 2, "checkpoint_every": 0},
        "arm": arms,
    }
    found = future_visible(attnscope.train_model(config, path=tmp_path / "r"))
    assert found.members == ("none",) and found.severity == "error" and found.also == ()
    assert "none predicts the next token with attention.mask = none: each query sees the keys after it" in found.summary
    encoder = {
        "model": {"kind": "encoder"},
        "attention": {"mask": "none"},
        "data": {"objective": "masked"},
    }
    assert future_visible(run_of(tmp_path / "e", encoder, steps=steps_table([4.0]))) is None


@pytest.mark.parametrize("causal", [True, False])
def test_a_real_decoder_without_its_mask_and_its_healthy_twin(tmp_path, causal):
    run = train(tmp_path / "r", model=Decoder(causal=causal), steps=30)
    assert [(f.rule, f.severity) for f in diagnose(run) if f.severity != "note"] == (
        [] if causal else [("future_visible", "error")]
    )


def test_a_real_decoder_that_is_to_copy_its_inputs(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        text = TEXT[:, :-1]
        F.cross_entropy(model(text).flatten(0, 1), text.flatten()).backward()
        optimizer.step()

    assert labels_shifted_wrong(train(tmp_path / "r", step)).severity == "error"
