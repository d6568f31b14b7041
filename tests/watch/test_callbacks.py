"""The callbacks for Hugging Face and Lightning: all is seen, nothing is changed, and a training that dies has its record."""

import gc
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.errors import AttnscopeError, ConfigError
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from attnscope.watch.callbacks import HuggingFaceCallback, LightningCallback
from attnscope.watch.watcher import watching
from tests.watch.foreign import layers_of

STEPS = 6
ATTENTION, BACKWARD = F.scaled_dot_product_attention, torch.Tensor.backward


class Tokens(torch.utils.data.Dataset):
    """Random tokens, the same for everybody; reading number `breaks_at` raises."""

    def __init__(self, breaks_at=None):
        self.breaks_at = breaks_at

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if i == self.breaks_at:
            raise ValueError("the data is broken")
        x = torch.randint(0, 60, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": x, "labels": x}


def assert_nothing_is_patched():
    assert watching() is None
    assert F.scaled_dot_product_attention is ATTENTION and torch.Tensor.backward is BACKWARD
    hooks = sys.modules["torch.optim.optimizer"]
    assert not hooks._global_optimizer_pre_hooks and not hooks._global_optimizer_post_hooks


# -- Hugging Face --


@pytest.fixture
def hugging_face():
    pytest.importorskip("accelerate", reason="the Trainer of transformers")
    return pytest.importorskip("transformers", reason="the Trainer of transformers")


def hf_trainer(transformers, folder, callbacks, *, accumulate=1, data=None, steps=STEPS):
    """A trainer of a tiny GPT-2, and the list that its logs go to."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    said = []

    class Logs(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            said.append(dict(logs))

    arguments = transformers.TrainingArguments(
        str(folder / "out"), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config), arguments, train_dataset=data or Tokens(), callbacks=[Logs(), *callbacks]
    )  # fmt: skip
    return trainer, said


def column(logs, name):
    return [log[name] for log in logs if name in log]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_hugging_face_sees_every_layer_and_changes_no_number(hugging_face, tmp_path, accumulate):
    plain, plain_logs = hf_trainer(hugging_face, tmp_path, [], accumulate=accumulate)
    plain.train()
    callback = HuggingFaceCallback(tmp_path / "run", every=2)
    assert isinstance(callback, hugging_face.TrainerCallback)
    trainer, logs = hf_trainer(hugging_face, tmp_path, [callback], accumulate=accumulate)
    trainer.train()
    assert_nothing_is_patched()

    assert column(logs, "loss") == column(plain_logs, "loss")
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name
    run = open_run(tmp_path / "run")
    assert run.status == "finished" and run.lost == ()
    assert [layer["name"] for layer in layers_of(run)] == [f"transformer.h.{i}.attn" for i in range(2)]  # fmt: skip
    assert run.steps["step"].tolist() == list(range(STEPS))
    assert sorted(set(run.heads["step"])) == sorted(set(run.params["step"])) == [0, 1, 2, 3, 4, 5]
    assert run.steps["loss"].tolist() == pytest.approx(column(logs, "loss"), rel=1e-5)
    assert run.steps["grad_norm"].tolist() == pytest.approx(column(logs, "grad_norm"), rel=1e-5)
    assert run.steps["lr"].tolist() == pytest.approx(column(logs, "learning_rate"))
    assert callback.watcher.updates == STEPS


@pytest.mark.parametrize("smooth", [0.0, 0.1])  # whether model or Trainer divides the losses
def test_hugging_face_watched_without_a_callback_has_the_same_losses(hugging_face, tmp_path, smooth):
    trainer, logs = hf_trainer(hugging_face, tmp_path, [], accumulate=3)
    trainer.args.label_smoothing_factor = smooth
    if smooth:
        trainer.label_smoother = hugging_face.trainer_pt_utils.LabelSmoother(epsilon=smooth)
    with watch_model(path=tmp_path / "run"):
        trainer.train()
    run = open_run(tmp_path / "run")
    assert run.steps["loss"].tolist() == pytest.approx(column(logs, "loss"), rel=1e-5)
    assert run.steps["grad_norm"].tolist() == pytest.approx(column(logs, "grad_norm"), rel=1e-5)


def test_hugging_face_an_exception_has_its_record_and_restores_pytorch(hugging_face, tmp_path):
    callback = HuggingFaceCallback(tmp_path / "run")
    trainer, logs = hf_trainer(hugging_face, tmp_path, [callback], data=Tokens(breaks_at=40), steps=40)  # fmt: skip
    with pytest.raises(ValueError, match="the data is broken"):
        trainer.train()
    assert_nothing_is_patched()
    run = open_run(tmp_path / "run")
    assert run.status == "failed" and run.ends[0]["error"] == "ValueError: the data is broken"
    assert run.steps["loss"].tolist() == pytest.approx(column(logs, "loss"), rel=1e-5)
    assert len(run.steps) > 0


def test_hugging_face_trains_twice_into_two_runs(hugging_face, tmp_path):
    trainer, _ = hf_trainer(hugging_face, tmp_path, [HuggingFaceCallback(tmp_path / "run")], steps=2)  # fmt: skip
    trainer.train()
    trainer.train()
    assert_nothing_is_patched()
    for name in ("run", "run-002"):
        run = open_run(tmp_path / name)
        assert run.status == "finished" and len(run.steps) == 2, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hugging_face_stops_on_conditions_and_logs_to_a_tracker(hugging_face, tmp_path):
    pytest.importorskip("tensorboard")
    callback = HuggingFaceCallback(tmp_path / "run", every=1, stop_on=["max_logit<1e9"], log_to="tensorboard")  # fmt: skip
    trainer, _ = hf_trainer(hugging_face, tmp_path, [callback])
    with pytest.raises(SystemExit):
        trainer.train()
    assert_nothing_is_patched()
    run = open_run(tmp_path / "run")
    assert "stopped" in set(run.events["kind"]) and run.steps["step"].tolist() == [0]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_hugging_face_a_callback_added_later_stops_when_its_trainer_trains_again_or_is_freed(hugging_face, tmp_path):
    trainer, _ = hf_trainer(hugging_face, tmp_path, [], data=Tokens(breaks_at=40), steps=40)
    trainer.add_callback(HuggingFaceCallback(tmp_path / "run"))
    for _ in range(2):
        with pytest.raises(ValueError, match="the data is broken"):
            trainer.train()
    assert watching() is not None
    assert open_run(tmp_path / "run").status == "interrupted"
    del trainer
    gc.collect()
    assert_nothing_is_patched()
    run = open_run(tmp_path / "run-002")
    assert run.status == "interrupted" and len(run.steps) > 0


SCRIPT = """
import sys
from pathlib import Path
import transformers
sys.path[:0] = {path!r}
from tests.watch.test_callbacks import Tokens, hf_trainer
from attnscope.watch.callbacks import HuggingFaceCallback
trainer, _ = hf_trainer(transformers, Path("."), [], data=Tokens(breaks_at=40), steps=40)
trainer.add_callback(HuggingFaceCallback("run"))
trainer.train()
"""


@pytest.mark.slow
def test_hugging_face_a_process_that_dies_of_an_exception_says_which(hugging_face, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(path=sys.path))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 1 and done.stderr.endswith("ValueError: the data is broken\n")
    run = open_run(tmp_path / "run")
    assert run.status == "failed" and run.ends[0]["error"] == "ValueError: the data is broken"


# -- Lightning --

# Lightning asks for more workers than tiny data needs, and PyTorch has renamed what Lightning goes through data with.
quiet = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")  # fmt: skip


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request):
    return pytest.importorskip(request.param, reason="Lightning")


def lit_model(lightning, breaks_at=None):
    """A tiny transformer that keeps its losses."""

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.embed, self.head = nn.Embedding(60, 16), nn.Linear(16, 60)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.losses = []

        def training_step(self, batch, batch_idx):
            if batch_idx == breaks_at:
                raise ValueError("the model is broken")
            z = self.head(self.encoder(self.embed(batch["input_ids"])))
            loss = F.cross_entropy(z.flatten(0, 1), batch["labels"].flatten())
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            self.encoder(self.embed(batch["input_ids"]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Lit()


def fit(lightning, model, folder, callbacks, **more):
    torch.manual_seed(1)  # for dropout
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=callbacks, **more,
    )  # fmt: skip
    trainer.fit(model, loader, loader)
    return trainer


@quiet
@pytest.mark.parametrize("more", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=["plain", "accumulated"])  # fmt: skip
def test_lightning_sees_every_layer_and_changes_no_number(lightning, tmp_path, more):
    plain, model = lit_model(lightning), lit_model(lightning)
    fit(lightning, plain, tmp_path, [], **more)
    callback = LightningCallback(tmp_path / "run", every=2)
    assert isinstance(callback, lightning.Callback)
    fit(lightning, model, tmp_path, [callback], **more)
    assert_nothing_is_patched()

    assert model.losses == plain.losses
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))
    run = open_run(tmp_path / "run")
    assert run.status == "finished" and run.lost == ()
    assert [layer["name"] for layer in layers_of(run)] == [f"encoder.layers.{i}.self_attn" for i in range(2)]  # fmt: skip
    assert run.steps["step"].tolist() == list(range(STEPS))
    assert sorted(set(run.heads["step"])) == sorted(set(run.params["step"])) == [0, 1, 2, 3, 4, 5]
    n = more.get("accumulate_grad_batches", 1)
    means = [sum(model.losses[i : i + n]) / n for i in range(0, len(model.losses), n)]
    assert run.steps["loss"].tolist() == pytest.approx(means, rel=1e-5)
    assert run.steps["lr"].tolist() == pytest.approx([1e-3] * STEPS)
    for step in (0, 2, 4):  # gradients that the optimizer's closure computed in this very step
        of_groups = run.params[run.params["step"] == step]["grad_norm"].astype(float)
        total = run.steps["grad_norm"][step]
        assert (of_groups**2).sum() ** 0.5 == pytest.approx(total, rel=1e-5)
        assert run.steps["clip_factor"][step] == pytest.approx(min(1, more.get("gradient_clip_val", 9) / total), rel=1e-4)  # fmt: skip


@quiet
def test_lightning_an_exception_has_its_record_and_restores_pytorch(lightning, tmp_path):
    model = lit_model(lightning, breaks_at=3)
    with pytest.raises(ValueError, match="the model is broken"):
        fit(lightning, model, tmp_path, [LightningCallback(tmp_path / "run")])
    assert_nothing_is_patched()
    run = open_run(tmp_path / "run")
    assert run.status == "failed" and run.ends[0]["error"] == "ValueError: the model is broken"
    assert run.steps["loss"].tolist() == pytest.approx(model.losses, rel=1e-6)
    assert len(run.steps) == 3


RANKS = """
import sys
import lightning, torch
sys.path[:0] = {path!r}
from tests.watch.test_callbacks import Tokens, fit, lit_model
from attnscope.watch.callbacks import LightningCallback
if __name__ == "__main__":
    fit(lightning, lit_model(lightning), ".", [LightningCallback()], devices=2, strategy="ddp")
"""


@pytest.mark.slow
def test_lightning_ranks_are_members_of_one_run_that_none_of_them_named(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="Lightning")
    (tmp_path / "script.py").write_text(RANKS.format(path=sys.path))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "runs" / "watch-001")
    assert run.status == "finished" and [m.name for m in run.members] == ["rank 0", "rank 1"]
    by_rank = run.steps.groupby("member", observed=True)
    assert [rows["step"].tolist() for _, rows in by_rank] == [list(range(STEPS))] * 2
    losses = [rows["loss"].tolist() for _, rows in by_rank]
    norms = [rows["grad_norm"].tolist() for _, rows in by_rank]
    assert losses[0] != losses[1] and norms[0] == norms[1]


def test_lightning_callbacks_can_be_sent_to_other_processes(lightning, tmp_path):
    callback = pickle.loads(pickle.dumps(LightningCallback(tmp_path / "run", every=3)))
    assert isinstance(callback, LightningCallback) and isinstance(callback, lightning.Callback)
    assert callback._made_with == (tmp_path / "run", {"every": 3})


def test_wrong_uses_give_one_line(hugging_face, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"^log_to is 'tensorbord', but must be tensorboard, wandb or mlflow\.$"):  # fmt: skip
        HuggingFaceCallback(tmp_path / "run", log_to="tensorbord")
    for name in ("transformers", "lightning.pytorch", "pytorch_lightning", "lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    for callback, package, extra in (
        (HuggingFaceCallback, "transformers", "hf"),
        (LightningCallback, "lightning", "lightning"),
    ):
        with pytest.raises(AttnscopeError) as raised:
            callback(tmp_path / "run")
        assert str(raised.value) == f'{package} is not installed. Install it: pip install "attnscope[{extra}]"'  # fmt: skip
