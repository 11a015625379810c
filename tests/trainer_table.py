"""What `MBATTrainer` does with each field, argument and method of `Trainer`; `python tests/trainer_table.py` writes
docs/trainer.md from it, and tests/mbat/test_trainer_table.py holds it to `transformers` and to what really happens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cmai_fast.mbat import MBATConfig
from cmai_fast.mbat.refused import ARGUMENTS, FIELDS, METHODS

DOCUMENT = Path(__file__).parents[1] / "docs" / "trainer.md"

_LR = "for the model; the heads follow the schedule from `heads_learning_rate`"
# Field: its effect. "own" is the code of `Trainer`, which MBATTrainer does not change.
WORKS = {
    "output_dir": "works; checkpoints, `cmcv/` and `mbat.json` go there",
    "per_device_train_batch_size": "works; a step that does not fit into memory runs in parts",
    "num_train_epochs": "works",
    "max_steps": "works",
    "learning_rate": f"works, {_LR}",
    "lr_scheduler_type": f"works, {_LR}",
    "lr_scheduler_kwargs": "works",
    "warmup_steps": f"works, {_LR}",
    "optim_args": "own; optimizers of other packages read it",
    "weight_decay": "works; the heads have none",
    "adam_beta1": "works, also for the heads",
    "adam_beta2": "works, also for the heads",
    "adam_epsilon": "works, also for the heads",
    "gradient_accumulation_steps": "works; the loss is that of the whole optimizer step",
    "average_tokens_across_devices": "works",
    "max_grad_norm": "works; the heads are not clipped. A norm that is not finite stops the run",
    "label_smoothing_factor": "works, in both branches, with labels shifted as in the model. Attacks "
    "maximise L_task without it, so `bridge` takes one more full pass. `eval_loss` is without it",
    "bf16": "works",
    "tf32": "own",
    "activation_checkpointing": "works, in attacks too; not beside `recompute`",
    "activation_checkpointing_kwargs": "works",
    "gradient_checkpointing": "works, in attacks too; not beside `recompute`",
    "gradient_checkpointing_kwargs": "works",
    "torch_compile_backend": "refused: it sets `torch_compile`",
    "torch_compile_mode": "refused: it sets `torch_compile`",
    "use_cache": "works",
    "neftune_noise_alpha": "works, in the clean and the adversarial branch; attacks run without noise",
    "torch_empty_cache_steps": "works",
    "auto_find_batch_size": "works, but is hardly needed: a step that does not fit runs in parts",
    "logging_strategy": "works",
    "logging_steps": "works; the parts of the loss are logged too",
    "logging_first_step": "works",
    "log_on_each_node": "own",
    "logging_nan_inf_filter": "never needed: a loss that is not finite stops the run",
    "include_num_input_tokens_seen": "works",
    "log_level": "own",
    "log_level_replica": "own",
    "disable_tqdm": "own",
    "report_to": "works",
    "run_name": "own",
    "project": "own",
    "trackio_space_id": "own",
    "trackio_bucket_id": "own",
    "trackio_static_space_id": "own",
    "eval_strategy": "works",
    "eval_steps": "works",
    "eval_delay": "works",
    "per_device_eval_batch_size": "works",
    "prediction_loss_only": "works",
    "eval_on_start": "works",
    "eval_do_concat_batches": "works",
    "eval_use_gather_object": "own",
    "eval_accumulation_steps": "works",
    "include_for_metrics": "works",
    "batch_eval_metrics": "works",
    "save_only_model": "works; the optimizers are not saved then",
    "save_strategy": "works",
    "save_steps": "works",
    "save_on_each_node": "own",
    "save_total_limit": "works; an old checkpoint is deleted when the new one is complete",
    "enable_jit_checkpoint": "own; it saves by the same method",
    "push_to_hub": "works, including the heads",
    "hub_token": "own",
    "hub_private_repo": "own",
    "hub_model_id": "works",
    "hub_strategy": "works, including the heads",
    "hub_always_push": "works",
    "hub_revision": "own",
    "load_best_model_at_end": "works; the heads are loaded too",
    "metric_for_best_model": "works, `eval_robust_accuracy` among them",
    "greater_is_better": "works",
    "ignore_data_skip": "own",
    "restore_callback_states_from_checkpoint": "own",
    "full_determinism": "own",
    "seed": "works, also for new heads and the random starts of attacks",
    "data_seed": "own",
    "use_cpu": "works",
    "accelerator_config": "works; `dispatch_batches` is off unless it is set",
    "dataloader_drop_last": "works",
    "dataloader_num_workers": "works",
    "dataloader_pin_memory": "own",
    "dataloader_persistent_workers": "works",
    "dataloader_prefetch_factor": "works",
    "dataloader_multiprocessing_context": "own",
    "dataloader_in_order": "own",
    "label_names": "works, for `predict`; a step learns from `labels`",
    "length_column_name": "not used: strategies that read it are refused",
    "ddp_backend": "works",
    "ddp_timeout": "own",
    "fsdp": "works with FSDP2; FSDP1 is refused",
    "fsdp_config": "works with `version` 2",
    "deepspeed": "works with ZeRO-1 and ZeRO-2 ([what is refused](scale.md#deepspeed)); ZeRO-3 is refused",
    "debug": "works",
    "skip_memory_metrics": "works",
    "do_train": "for scripts; `Trainer` does not read it",
    "do_eval": "for scripts; `Trainer` does not read it",
    "do_predict": "for scripts; `Trainer` does not read it",
    "resume_from_checkpoint": "for scripts; give `train(resume_from_checkpoint=...)`, which is bit-exact",
    "local_rank": "own",
}
IN_PART = {  # refused for some values, and works for others
    "optim": "works; LOMO and layerwise optimizers are refused. The heads use it where it is PyTorch's own, else AdamW",
    "train_sampling_strategy": "`random` and `sequential` work; others are refused",
    "remove_unused_columns": "off, unlike in `Trainer`; True is refused",
}
GIVEN = {
    "model": "works; one that `bridge_of` supports",
    "args": "an `MBATConfig`",
    "data_collator": "works; None uses `VQACollator` with the processor, or stacks rows that already have `labels`",
    "train_dataset": "works: records, `Sample`s, a stream, rows of tensors",
    "eval_dataset": "works, a dictionary of data sets too",
    "processing_class": "the model's processor; required",
    "compute_loss_func": "works, for both branches, with the outputs of the model at their image features. Attacks "
    "still maximise L_task, so `bridge` takes one more full pass. Not for dual encoders",
    "compute_metrics": "works",
    "callbacks": "works",
    "optimizers": "works, with a scheduler or without; the heads have an optimizer of their own",
    "optimizer_cls_and_kwargs": "works; the heads use AdamW",
    "preprocess_logits_for_metrics": "works",
}
OVERRIDDEN = {  # methods that MBATTrainer overrides; a subclass may do so again, and call super()
    "training_step": "the adversarial step",
    "create_optimizer": "with Muon; a subclass need not call it",
    "evaluation_loop": "adds robust metrics; restores model and random state",
    "prediction_step": "adds robust metrics",
    "log": "adds the parts of the loss",
    "save_model": "saves the heads too",
    "create_model_card": "adds the settings of adversarial training",
}


INTRODUCTION = """# MBATTrainer and Trainer

`MBATTrainer` takes the arguments of `transformers.Trainer`. Unsupported options are refused by name at construction;
none is dropped silently. "own" marks options handled by code of `Trainer` that MBATTrainer does not change; these are
not tested here.
This page is written by `python tests/trainer_table.py`, and a test compares it with the installed `transformers`.

The loss is reduced as in `Trainer`: the mean over all answer tokens of an optimizer step, over all micro-batches and
processes (`num_items_in_batch`). If the model's forward does not take this number, it is the mean over micro-batches of
each one's mean over tokens. `loss_reduction="samples"` takes the mean over samples of each sample's mean over its
tokens. `eval_loss` is a mean over samples.

A sample without image tokens is trained on its text: there is no image to perturb, so its loss counts once, in full
(with `modality` text or both its words are attacked).

## Attacks on the text

`modality="text"` attacks the words of the prompt in place of the image, `"both"` the two together. A perturbation is
added to the input embedding of each word, at most `text_eps` times as long as the embedding itself (`text_norm="linf"`:
each element at most `text_eps` times its root mean square). Image tokens and responses stay.

The gradient at the words comes with the one at the bridge, from the same backward pass, and the best step along it has
a closed form: `both` takes no pass more than `image`, and `text` with the bridge solver and `refreshes=0` takes one
adversarial pass of the language side and nothing else. `evaluate` attacks what training attacks, by PGD. S_c reads the
image, so `beta` and ARM concern attacks on it. Dual encoders, encoder-decoders and FSDP are refused. [What this
buys](results.md#attacks-on-the-text).

## Image features alone: FARE and Sim-CLIP

`objective="fare"` (Schlarmann et al. 2024) keeps the features of attacked images where those of the clean ones were
before training; `objective="sim-clip"` (Hossain and Imteaz 2024) makes features of clean and attacked images attract
each other. Neither reads labels or runs the language side, so a step costs passes of the vision side alone, and
records need no right answers: any pictures of the kind to be defended will do. Attacks maximise the same distance.
Both need `inner` pgd or fgsm, `beta=0`, `gamma=0` and no `heads`; `--defence fare` and `--defence sim-clip` set these:

```python
from cmai_fast.defences import DEFENCES

trainer = cf.MBATTrainer(model, cf.MBATConfig("out", eps=2 / 255, **DEFENCES["fare"].values), ...)
```

`fare` holds a copy of the vision side, as the trainer got it. Features are those that cross the bridge (all of h_v; the
papers take CLIP's class token), and their squared distance is relative to the squared length of the original ones.
With `lam` below 1, 1 - lam weighs the same distance of clean images. FSDP is refused.

## S_c: heads or a verifier

Without `heads=` the trainer makes `ConsistencyHeads`, two projections whose cosine is S_c. A `Verifier` learns more
from the same data:

```python
verifier = cf.Verifier.for_data(model, processor, records)
config = cf.MBATConfig("out", gamma=1.0, beta=0.0, arm=False, consistency_steps=5, anchor=1.0)
trainer = cf.MBATTrainer(model, config, heads=verifier, ...)
```

Per picture it reads everything that the records say of it, each question with its answer and wrong ones, where L_task
has one question per sample. S_c is the probability of the right answers, the geometric mean over these statements.
Its text side is one small layer over the input embeddings, so neither S_c nor its loss takes a pass of the language
model.

- `gamma` weighs its loss, the cross-entropy of the right answers on clean and adversarial images; `beta` its share in
  the attack.
- With `consistency_steps=n` each full step is followed by n steps on S_c alone: an attack of three steps on S_c, and
  the verifier's loss on its images. They train the vision side, and the language model does not run. [What this
  buys](results.md#what-consistency-buys).
- In these steps `anchor` weighs how far features of the attacked images are from those of the clean ones before
  training, by the distance of `fare`, from a copy of the vision side. The verifier's loss alone lets features of which
  the records say nothing go, and clean accuracy with them, the more the less they say of a picture. [What this
  buys](results.md#robust-accuracy-for-training-time).
- `Verifier.for_data` reads the records once; pictures given as files are told apart by their paths, others by
  content. With a data set that cannot be read in advance, `VQACollator(processor, statements=...)` takes a function
  of your own.
- It is saved to `cmcv/` like heads, and `cmai-fast calibrate` sets its threshold. FSDP is refused.

## ARM

ARM raises `beta`, and `eps` and `lam` if they have a bound, while S_c of adversarial images is low. It returns them to
their values afterwards, so that they do not stay up: a higher beta itself lowers S_c. S_c is low if its mean is below
`tau_train`, or its variance above `variance_max`; both come from S_c of the clean images of the last steps. There is
one update per optimizer step, with all its micro-batches and processes.

ARM needs trained consistency heads: those given as `heads=`, or, after 300 steps, those that this run trains (`gamma`
above 0). Without them it is off, and `arm=True` is refused.

The log holds `beta`, `eps` (before `eps_warmup`), `lam` and `arm_level` (0: none is raised, 1: all are at their bounds)
of the step, and the averages `arm_mean` and `arm_variance` of S_c beside `tau_train`. Evaluations keep to `eps`.

With `gamma` above 0 the heads learn from adversarial images too, as images that fit their texts. So S_c of adversarial
images comes close to that of clean ones, and ARM acts less the longer the heads learn.
"""
CHANGED = """A field changed after construction takes effect at once, in training and evaluation. Later changes of
`trainable` and `recompute` are refused.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rows(table: dict[str, str]) -> list[str]:
    return [f"| `{name}` | {_cell(what)} |" for name, what in table.items()]


def fields() -> dict[str, str]:
    """Every field of `TrainingArguments` that is known here, by its order there."""
    refused = {name: f"refused: {reason}" for name, (_, reason) in FIELDS.items()}
    known = {**refused, **WORKS, **IN_PART}
    order = [f.name for f in dataclasses.fields(MBATConfig)]
    return {name: known[name] for name in sorted(known, key=lambda n: order.index(n) if n in order else len(order))}


def document() -> str:
    own = {f.name: f.metadata["help"] for f in dataclasses.fields(MBATConfig) if f.name in MBATConfig.__annotations__}
    own.pop("remove_unused_columns")
    refused = {name: f"refused: {reason}" for name, reason in ARGUMENTS.items()}
    methods = {name: f"a subclass may not override it: {reason}" for name, reason in METHODS.items()}
    lines = [
        INTRODUCTION,
        "## Fields of MBATConfig",
        "",
        "| field | meaning |",
        "|---|---|",
        *_rows(own),
        "",
        CHANGED,
        "## Fields of TrainingArguments",
        "",
        "| field | in `MBATTrainer` |",
        "|---|---|",
        *_rows(fields()),
        "",
        "## Arguments of Trainer",
        "",
        "| argument | in `MBATTrainer` |",
        "|---|---|",
        *_rows(GIVEN | refused),
        "",
        "## Methods of Trainer",
        "",
        "| method | in `MBATTrainer` |",
        "|---|---|",
        *_rows(OVERRIDDEN | methods),
        "| all others | own |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
