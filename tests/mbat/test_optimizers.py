"""The heads' own optimizer: it follows the schedule of whatever steps the model, is saved, and resumes bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback, get_linear_schedule_with_warmup

from cmai_fast.mbat import MBATTrainer


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.model: list[float] = []
        self.heads: list[float] = []
        self.trainer: Any = None

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.model.append(optimizer.param_groups[0]["lr"])
        self.heads.append(self.trainer._heads_optimizer.param_groups[0]["lr"])


def ways(model: Any) -> dict[str, dict[str, Any]]:
    own = torch.optim.AdamW(model.parameters(), lr=0.01)
    other = torch.optim.SGD(model.parameters(), lr=0.01)
    return {
        "optimizer and scheduler": {"optimizers": (own, get_linear_schedule_with_warmup(own, 2, 4))},
        "optimizer": {"optimizers": (other, None)},
        "class": {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 0.01})},
        "named": {},
    }


@pytest.mark.parametrize("way", ["optimizer and scheduler", "optimizer", "class", "named"])
def test_heads_learn_beside_any_optimizer_and_follow_its_schedule(make_trainer, make_tiny, way):
    rates = Rates()
    model = make_tiny()[0]
    trainer = make_trainer(
        model=model, callbacks=[rates], heads_learning_rate=0.02, save_strategy="no", warmup_steps=1,
        given=ways(model)[way],
    )  # fmt: skip
    rates.trainer = trainer
    begin = [p.detach().clone() for p in trainer.heads.parameters()]
    trainer.train()
    assert len(rates.model) == 4 and len(set(rates.model)) > 2
    assert rates.heads == pytest.approx([2 * rate for rate in rates.model])
    moved = [not torch.equal(p, q) for p, q in zip(trainer.heads.parameters(), begin, strict=True)]
    assert all(moved)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in trainer.heads.parameters()}


def test_an_optimizer_made_by_a_subclass_moves_the_heads_too(make_trainer, monkeypatch):
    def own(self: Any, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        return self.optimizer

    monkeypatch.setattr(MBATTrainer, "create_optimizer", own)
    trainer = make_trainer(max_steps=1, save_strategy="no")
    begin = trainer.heads.image_out.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.heads.image_out.weight, begin)
    assert type(trainer._heads_optimizer) is torch.optim.AdamW


def test_heads_follow_another_optimizer_and_learn_from_a_later_gamma(make_trainer):
    class Raise(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.gamma = 0.5

    trainer = make_trainer(max_steps=1, save_strategy="no", gamma=0.0, callbacks=[Raise()])
    begin = trainer.heads.image_out.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.heads.image_out.weight, begin)
    trainer.args.max_steps = 2
    trainer.args.gamma = 0.0
    trainer.train()  # the second step has a gamma
    first = trainer.heads.image_out.weight.detach().clone()
    assert not torch.equal(first, begin)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.01)
    trainer.train()
    assert not torch.equal(trainer.heads.image_out.weight, first)


def test_heads_that_cannot_learn_are_named(make_trainer):
    trainer = make_trainer(max_steps=1, save_strategy="no")
    trainer.heads.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="parameters of the heads require no gradient, so they do not learn"):
        trainer.train()
    quiet = make_trainer(max_steps=1, save_strategy="no", gamma=0.0)
    quiet.train()
    assert quiet._heads_optimizer is None


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("way", ["optimizer and scheduler", "class"])
def test_a_run_resumes_bit_for_bit_with_any_optimizer(make_trainer, make_tiny, tmp_path, way):
    def make(folder: str, **more: Any) -> MBATTrainer:
        model = make_tiny()[0]
        return make_trainer(model=model, output_dir=str(tmp_path / folder), given=ways(model)[way], **more)

    whole = make("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("out", callbacks=[Stop()]).train()
    again = make("out")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for one, two in ((whole.model, again.model), (whole.heads, again.heads)):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    states = [list(t._heads_optimizer.state_dict()["state"].values()) for t in (whole, again)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*states, strict=True) for k in a)


def test_checkpoints_without_the_heads_optimizer_are_refused_by_name(make_trainer, tmp_path):
    make_trainer(max_steps=2).train()
    folder = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"was saved by a run that trained the heads, and gamma is 0.0 now"):
        make_trainer(gamma=0.0).train(resume_from_checkpoint=str(folder))
    (folder / "heads_optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"has no heads_optimizer.pt: .* by an older version.*Start a new run from"):
        make_trainer().train(resume_from_checkpoint=str(folder))
