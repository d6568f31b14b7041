"""Every source: held-out data is never trained on, a step is a pure function of the seed, references are right."""

import collections
import hashlib
import math

import pytest
import torch

from attnscope.config.schema import DataConfig
from attnscope.data import IGNORE, open_data
from attnscope.data.tasks import EQUALS, MODULUS, PLUS, RECALL_KEYS, stationary
from attnscope.errors import DataError

SOURCES = ["stdlib", "markov", "recall", "modular"]


def corpus(source, *, seq_len=32, **settings):
    return open_data(DataConfig(source=str(source), **settings), seq_len=seq_len)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"abracadabra " * 100)
    return path


@pytest.mark.parametrize(
    ("source", "objective"),
    [*((source, "next_token") for source in SOURCES), ("stdlib", "masked"), ("markov", "masked")],
)
def test_a_batch_is_a_pure_function_of_seed_and_step(source, objective):
    data, again = (corpus(source, objective=objective) for _ in range(2))
    again.train_batch(0)  # drawing another step in between changes nothing
    first, second = data.train_batch(7), again.train_batch(7)
    assert torch.equal(first.tokens_BT, second.tokens_BT)
    assert torch.equal(first.targets_BT, second.targets_BT)
    assert not torch.equal(first.tokens_BT, data.train_batch(8).tokens_BT)
    other = corpus(source, objective=objective, seed=1)
    assert not torch.equal(first.tokens_BT, other.train_batch(7).tokens_BT)
    assert first.tokens_BT.shape == (8, 32) == first.targets_BT.shape
    assert int(first.tokens_BT.max()) < data.vocab_size
    assert first.scores_all == bool((first.targets_BT != IGNORE).all())


@pytest.mark.parametrize("source", SOURCES)
def test_held_out_batches_are_the_same_every_time(source):
    data = corpus(source)
    for left, right in zip(data.val_batches(seq_len=32, count=3), data.val_batches(seq_len=32, count=3), strict=True):
        assert torch.equal(left.tokens_BT, right.tokens_BT)


def test_text_is_split_into_a_train_part_and_a_held_out_part(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    data = corpus(path, seq_len=16)
    for step in range(200):
        batch = data.train_batch(step)
        assert set(batch.tokens_BT.unique().tolist()) == {ord("a")}
        assert set(batch.targets_BT.unique().tolist()) == {ord("a")}
    for batch in data.val_batches(seq_len=16, count=50):
        assert set(batch.tokens_BT.unique().tolist()) == {ord("b")}
    assert data.fingerprint["train_tokens"] == 900 and data.fingerprint["held_out_tokens"] == 100


def test_targets_are_the_next_bytes(text):
    data = corpus(text)
    batch = data.train_batch(0)
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    assert data.decode(batch.tokens_BT[0]) in "abracadabra " * 5


def test_reference_losses_of_text_by_hand(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab" * 450 + b"ba" * 50)
    reference = corpus(path, seq_len=8).reference
    assert reference.uniform == pytest.approx(math.log(256))
    assert reference.unigram == pytest.approx(-math.log(451 / (900 + 256)))
    # Train: 450 x ab, 449 x ba. Held out: 50 x ba, 49 x ab.
    p_ab, p_ba = 451 / (450 + 256), 450 / (449 + 256)
    assert reference.bigram == pytest.approx(-(50 * math.log(p_ba) + 49 * math.log(p_ab)) / 99)
    assert reference.optimum is None


def test_the_standard_library_has_the_known_unigram_loss():
    data = corpus("stdlib")
    assert data.reference.unigram == pytest.approx(3.15, abs=0.1)
    assert data.reference.bigram < data.reference.unigram
    assert data.vocab_size == 256
    assert data.fingerprint["files"] > 100


def test_the_fingerprint_is_the_hash_of_the_bytes(text):
    before = corpus(text).fingerprint
    assert before["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    text.write_bytes(text.read_bytes()[:-1] + b"!")
    assert corpus(text).fingerprint != before


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path):
    for name, content in {
        "b.txt": b"2" * 300,
        "a/z.txt": b"1" * 300,
        ".hidden": b"x" * 300,
        ".git/config": b"x" * 300,
        "picture.png": b"\0" * 300,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    data = corpus(tmp_path, seq_len=8)
    assert data.fingerprint["sha256"] == hashlib.sha256(b"1" * 300 + b"2" * 300).hexdigest()
    assert data.fingerprint["files"] == 2


def test_the_markov_chain_has_the_entropy_rate_it_says():
    data = corpus("markov", batch_size=256, seq_len=256)
    pairs = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(20):
        batch = data.train_batch(step)
        index = (batch.tokens_BT * 64 + batch.targets_BT).flatten()
        pairs += torch.bincount(index, minlength=64 * 64).view(64, 64)
    log_p = data.transition_VV.log()
    assert float(-(pairs * log_p).sum() / pairs.sum()) == pytest.approx(data.reference.optimum, rel=2e-3)
    assert data.reference.optimum == data.reference.bigram < data.reference.unigram
    assert torch.allclose(pairs.sum(dim=1) / pairs.sum(), data.stationary_V, atol=2e-3)


def test_the_stationary_distribution_of_two_states_by_hand():
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    assert stationary(transition).tolist() == pytest.approx([0.75, 0.25])


def recall_answers(batch):
    for tokens, targets in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True):
        known = {}
        for position, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if target != IGNORE:
                yield known[token], target
            elif token < RECALL_KEYS and position + 1 < len(tokens):
                known.setdefault(token, tokens[position + 1])


@pytest.mark.parametrize("seq_len", [7, 12, 32, 200])
def test_recall_is_solved_by_looking_back(seq_len):
    data = corpus("recall", seq_len=seq_len)
    batches = [data.train_batch(0), *data.val_batches(seq_len=seq_len, count=1)]
    answers = [answer for batch in batches for answer in recall_answers(batch)]
    assert len(answers) >= 2 * 8 * 2
    assert all(said == asked for said, asked in answers)
    assert data.reference.optimum == 0


def test_recall_sequences_are_trained_on_or_held_out_never_both():
    data = corpus("recall", batch_size=500)

    def sides(batch):
        pairs = batch.tokens_BT[:, : 2 * data.fingerprint["pairs"]].unflatten(1, (-1, 2))
        return set(((pairs[..., 1] - RECALL_KEYS).sum(dim=1) + pairs[:, 0, 0]).remainder(4).tolist())

    assert sides(data.train_batch(0)) == {1, 2, 3}
    assert sides(data.val_batches(seq_len=32, count=1)[0]) == {0}


def modular_problems(batch):
    for tokens, targets in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True):
        for position, target in enumerate(targets):
            if target != IGNORE:
                a, plus, b, equals = tokens[position - 3 : position + 1]
                assert (plus, equals) == (PLUS, EQUALS)
                yield a, b, target


def test_modular_answers_are_right_and_problems_are_split():
    data = corpus("modular", batch_size=64)
    trained, held_out = set(), set()
    for step in range(30):
        for a, b, c in modular_problems(data.train_batch(step)):
            assert (a + b) % MODULUS == c
            trained.add((a, b))
    for batch in data.val_batches(seq_len=32, count=30):
        held_out |= {(a, b) for a, b, _ in modular_problems(batch)}
    assert len(trained) > 5000 and len(held_out) > 1000
    assert not trained & held_out
    assert data.decode(torch.tensor([3, PLUS, 96, EQUALS, 2])) == "3 + 96 = 2"


def test_masking_hides_fifteen_percent_in_sequences_of_different_length():
    data = corpus("stdlib", objective="masked", batch_size=512, seq_len=64)
    plain = corpus("stdlib", batch_size=512, seq_len=64)
    batch, original = data.train_batch(3), plain.train_batch(3).tokens_BT
    mask, padding = 256, 257
    real = batch.visible_BS
    assert data.vocab_size == 258
    lengths = real.sum(dim=1)
    assert lengths.min() >= 16 and lengths.max() <= 64 and len(lengths.unique()) > 30
    assert torch.equal(batch.tokens_BT == padding, ~real)
    chosen = batch.targets_BT != IGNORE
    assert not (chosen & ~real).any()
    assert torch.equal(batch.targets_BT[chosen], original[chosen])
    assert float(chosen[real].float().mean()) == pytest.approx(0.15, abs=0.01)
    fate = collections.Counter(
        "mask" if now == mask else "kept" if now == was else "random"
        for now, was in zip(batch.tokens_BT[chosen].tolist(), original[chosen].tolist(), strict=True)
    )
    assert fate["mask"] / chosen.sum() == pytest.approx(0.8, abs=0.03)
    assert fate["random"] / chosen.sum() == pytest.approx(0.1, abs=0.03)
    untouched = real & ~chosen
    assert torch.equal(batch.tokens_BT[untouched], original[untouched])
    assert data.reference.bigram is None


def test_every_masked_batch_has_a_target():
    data = corpus("stdlib", objective="masked", batch_size=1, seq_len=2)
    for step in range(50):
        assert (data.train_batch(step).targets_BT != IGNORE).any()


def test_longer_evaluation_sequences_stay_in_the_held_out_part(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 1800 + b"b" * 200)
    data = corpus(path, seq_len=16)
    batch = data.val_batches(seq_len=64, count=1)[0]
    assert batch.tokens_BT.shape == (8, 64)
    assert set(batch.tokens_BT.unique().tolist()) == {ord("b")}


def test_decode_shows_what_is_not_utf_8():
    assert corpus("stdlib").decode(torch.tensor([104, 105, 255])) == "hi\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: corpus("stdlip"),
            "data.source = stdlip: no such file or folder. Did you mean stdlib? Sources: stdlib, markov, recall, "
            "modular, or a path.",
        ),
        (
            lambda folder: corpus(folder / "empty"),
            "data.source = {0}/empty has no text in it. Give a file or folder with text.",
        ),
        (
            lambda folder: corpus(folder / "short"),
            "data.source = {0}/short has 100 bytes, but model.seq_len = 32 needs at least 340: a tenth is held out "
            "and must hold a sequence. Use more text or a shorter seq_len.",
        ),
        (
            lambda folder: corpus("/dev/null"),
            "data.source = /dev/null is neither a file nor a folder. Give a text file.",
        ),
        (
            lambda folder: corpus("recall", seq_len=6),
            "data.source = recall needs model.seq_len of at least 7 for two pairs and two questions, but it is 6. "
            "Use a longer seq_len.",
        ),
        (
            lambda folder: corpus("modular", seq_len=3),
            "data.source = modular needs model.seq_len of at least 4 for one problem, but it is 3. Use a longer "
            "seq_len.",
        ),
    ],
)
def test_what_cannot_be_used_gives_one_line(make, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_bytes(b"x" * 100)
    with pytest.raises(DataError) as caught:
        make(tmp_path)
    assert str(caught.value) == message.format(tmp_path)
