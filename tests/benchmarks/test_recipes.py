"""The recipes run for hours; a few steps of the tiny model show that they still fit the library."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.defences import DEFENCES
from cmai_fast.pipeline import Pipeline


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "recipes"))
    DEFENCES.items()  # imports them
    monkeypatch.setattr(DEFENCES, "_things", dict(DEFENCES._things))  # the frontier adds its rows
    yield
    for name in (
        "harden_vision",
        "full_strength",
        "build_easyvqa_llava",
        "at_size",
        "sized_models",
        "on_gpu",
        "peers",
        "profile_step",
        "frontier",
        "ablation",
        "scenes",
    ):
        sys.modules.pop(name, None)


def test_hardening_trains_the_tower_alone_and_appears_whole(recipes, make_tiny, tmp_path, monkeypatch):
    import harden_vision

    model, processor = make_tiny()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "tiny")
    settings = {"steps": 20, "lr": 1e-3, "inner_steps": 1, "batch": 4}

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(harden_vision, "write_results", full_disk)
        with pytest.raises(OSError, match="no space"):
            harden_vision.harden(str(tmp_path / "tiny"), tmp_path / "a", 8 / 255, 5, **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        harden_vision.harden(str(tmp_path / "tiny"), tmp_path / name, 8 / 255, seed, **settings)
    weights = {k: Pipeline.load(str(tmp_path / k)).model.state_dict() for k in ("tiny", "a", "b", "c")}
    moved = {name for name, value in weights["a"].items() if not torch.equal(value, weights["tiny"][name])}
    assert moved and all("vision_tower" in name for name in moved)
    assert all(torch.equal(value, weights["b"][name]) for name, value in weights["a"].items())
    assert any(not torch.equal(value, weights["c"][name]) for name, value in weights["a"].items())
    harden_vision.harden(str(tmp_path / "tiny"), tmp_path / "a", 8 / 255, 5, **settings)  # there already: it stays
    with pytest.raises(ValueError, match=r"other settings.*name another folder"):
        harden_vision.harden(str(tmp_path / "tiny"), tmp_path / "a", 16 / 255, 5, **settings)


def test_the_attack_on_the_probe_stays_in_the_ball_and_raises_its_loss(recipes, make_tiny):
    import harden_vision

    probe = harden_vision.Probe(make_tiny()[0].model.vision_tower)
    clean = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, -1]), torch.tensor([0, 1, 2, -1, 0, 1])
    adv = harden_vision.attack(probe, clean, *labels, 8 / 255, 5, 0)
    assert (adv - clean).abs().max() <= 8 / 255 + 1e-6
    assert adv.min() >= 0 and adv.max() <= 1
    assert probe.loss(adv, *labels) > probe.loss(clean, *labels)
    assert all(p.requires_grad and p.grad is None for p in probe.parameters())


def test_work_of_other_settings_is_not_taken_for_this_run(recipes, tmp_path):
    import full_strength

    settings = full_strength.settings_of("fgsm-rs", 16 / 255, 0, tmp_path)
    for _ in range(2):
        full_strength.claim(tmp_path / "work", settings)
    with pytest.raises(ValueError, match=r"started with other settings.*--work"):
        full_strength.claim(tmp_path / "work", full_strength.settings_of("fgsm-rs", 8 / 255, 0, tmp_path))


def test_every_defence_of_the_table_has_settings_that_the_trainer_takes(recipes, tmp_path):
    import full_strength

    from cmai_fast.workflows.training import training_arguments

    for defence in full_strength.DEFENCES:
        settings = full_strength.settings_of(defence, 16 / 255, 3, tmp_path)
        args = training_arguments(settings, tmp_path)
        assert (args.eps, args.seed, args.muon) == (16 / 255, 3, True)
        assert (settings.model == "easyvqa-llava") == (defence not in ("hardened", "immune"))


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {
    "llava": lambda m: m.llava(VISION | {"image_size": 28, "patch_size": 14, "projection_dim": 16}, TEXT),
    "qwen2.5-vl": lambda m: m.qwen2_5_vl(
        {
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}},
        side=56,
    ),
    "clip": lambda m: m.clip(
        VISION | {"image_size": 28, "patch_size": 14, "projection_dim": 16}, VISION | {"projection_dim": 16}, width=16
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "bits"), [("llava", None), ("llava", 4), ("llava", 8), ("qwen2.5-vl", 4), ("clip", None)]
)
def test_a_step_at_size_is_measured(recipes, model, bits, tmp_path, monkeypatch):
    import at_size
    import sized_models

    built, build = [], sized_models.build

    def remember(*args):
        built.append(build(*args))
        built.append({name: p.clone() for name, p in built[0].named_parameters()})
        return built[0]

    monkeypatch.setattr(at_size, "build", remember)
    monkeypatch.setattr(at_size, "MODELS", {"small": lambda: SMALL[model](sized_models)})
    out = tmp_path / "small.json"
    command = [
        "at_size.py",
        "--model",
        "small",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--inner-steps",
        "2",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", command + (["--bits", str(bits)] if bits else []))
    at_size.main()
    found = json.loads(out.read_text())
    assert found["over_clean"]["clean"] == 1.0 and set(found["seconds_a_step"]) == set(
        at_size.applicable(built[0], torch.device("cpu"))
    )
    left_out = {"bridge-r0-graphs", "cmai-graphs"} | ({"cmai"} if model == "clip" else set())
    assert set(at_size.STEPS) - set(found["seconds_a_step"]) == left_out
    assert all(bytes_ > 0 for bytes_ in found["peak_bytes"].values())
    after, before = built
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("language_model" in name or "text_model" in name for name in moved)
    assert {type(m).__name__ for m in after.modules()} >= (
        {"Linear4bit"} if bits == 4 else {"Linear8bitLt"} if bits else set()
    )
    assert not any(t.is_meta for t in (*after.parameters(), *after.buffers()))


def test_the_models_at_size_have_their_published_sizes(recipes):
    import sized_models
    from accelerate import init_empty_weights
    from transformers import AutoModel, AutoModelForImageTextToText

    for name, billions in (("llava-7b", 7.06), ("qwen2.5-vl-7b", 8.29), ("clip-l-336", 0.43), ("llava-100m", 0.143)):
        kind = AutoModel if name.startswith("clip") else AutoModelForImageTextToText
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(sized_models.MODELS[name]().config)
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == pytest.approx(billions, abs=0.006), name


def test_targets_at_size_are_judged_by_what_was_measured(recipes, tmp_path):
    import at_size
    import on_gpu
    import sized_models

    assert on_gpu.targets("llava-7b", tmp_path) == []
    for ratio in (2.4, 2.6):
        measured = {"over_clean": {"mbat-bridge-r0": ratio, "cmai": 1.5}}
        (tmp_path / "llava-7b.json").write_text(json.dumps(measured))
        judged, of_cmai = on_gpu.targets("llava-7b", tmp_path)
        assert judged["measured"] == ratio and judged["met"] == (ratio < 2.5) and of_cmai["met"]
    for name, (command, asked) in on_gpu.AT_SIZE.items():
        assert command[command.index("--model") + 1] in sized_models.MODELS
        steps = command[command.index("--only") + 1 :] if "--only" in command else list(at_size.STEPS)
        assert all(step in steps for _, step in asked), name


def test_runs_on_a_gpu_add_up_and_a_failure_is_recorded(recipes, tmp_path, monkeypatch):
    import on_gpu

    def command(name, code):
        measured = json.dumps({"over_clean": {"mbat-bridge-r0": 2.0, "cmai": 1.0}})
        write = f"open({str(tmp_path / name)!r} + '.json', 'w').write({measured!r})"
        return [sys.executable, "-c", f"{write if not code else 0}; print('done'); raise SystemExit({code})"]

    commands = {"tests": command("tests", 1), "llava-7b": command("llava-7b", 0), "clip-l-336": ["no-such-tool"]}
    for name, value in (("is_available", True), ("get_device_name", "H"), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(on_gpu, "commands", lambda out: commands)
    codes = []
    for only in commands:
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path), "--only", only])
        codes.append(on_gpu.main())
    runs = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert codes == [1, 1, 1]  # a failure that stands in gpu.json is not forgotten
    assert [runs[n]["exit_code"] for n in commands] == [1, 0, None]
    assert runs["llava-7b"]["targets"][0]["met"] and runs["llava-7b"]["tail"] == ["done"]
    assert runs["clip-l-336"]["tail"] == ["no-such-tool is not installed"]
    monkeypatch.setattr(on_gpu, "versions", lambda: {"commit": "another"})
    on_gpu.main()
    assert list(json.loads((tmp_path / "gpu.json").read_text())["runs"]) == ["clip-l-336"]


def test_a_classifier_is_attacked_by_a_suite_as_by_its_peers(recipes):
    import peers

    from cmai_fast.evaluation.suite import AttackSpec

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6)).requires_grad_(False)
    x = torch.rand(12, 3, 4, 4)
    y = model(x).argmax(1)
    toward = [AttackSpec("apgd", 5, settings={"loss": "margin"}, other=k) for k in range(7)]
    plan = [AttackSpec("apgd", 5), *toward, AttackSpec("square", 20)]
    found = {eps: peers.robust(model, plan, x, y, eps, batch=5) for eps in (1e-6, 0.05, 0.5)}
    shares = [found[eps]["final"] for eps in found]
    assert shares[0] == 1.0 > shares[1] > shares[2] == 0.0
    assert list(found[0.05]["robust"].values()) == sorted(found[0.05]["robust"].values(), reverse=True)
    # APGD: the clean image, its start and five steps; towards each of five classes also their order; then 20 queries.
    assert found[1e-6]["forward_per_image"] == 7 + 5 * 8 + 21 and found[0.5]["forward_per_image"] <= 14
    assert peers.installed("torch") and not peers.installed("no-such-peer")


def test_scenes_are_cut_outs_on_photos_and_resume_as_they_were(recipes, tmp_path, monkeypatch):
    import scenes

    share, out = tmp_path / "share", tmp_path / "scenes"
    for folder, name, said in (
        ("animals/birds", "duck", "A duck."), ("food/fruit", "pear", "A pear (half)."), ("symbols", "x", "A cross."),
        ("animals/cartoon", "cat", "A cat."), ("tools", "saw", "de.utf8=Eine Saege"),
    ):  # fmt: skip
        place = share / "tuxpaint" / "stamps" / folder
        place.mkdir(parents=True)
        stamp = Image.new("RGBA", (40, 20))
        stamp.paste((255, 0, 0, 255), (10, 5, 30, 15))
        stamp.save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"{said}\nfr.utf8=Un objet\n")
    assert list(scenes.stamps(share).values()) == ["a duck", "a pear"], "no cartoon, symbol, or stamp without a name"
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--share", str(share), "--out", str(out), "--scenes", "4"])
    with pytest.raises(SystemExit, match="has 2 stamps and 0 photos; expected"):
        scenes.main()
    (share / "backgrounds").mkdir()
    Image.new("RGB", (300, 200), (0, 0, 200)).save(share / "backgrounds" / "sky.jpg")
    monkeypatch.setattr(scenes, "stamps", lambda share: dict.fromkeys(share.rglob("duck.png"), "a duck"))
    monkeypatch.setattr(scenes.random.Random, "choice", lambda self, values: values[0])
    scenes.main()
    records = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert records == [{"file_name": f"{i:05}.png", "caption": "a duck"} for i in range(4)]
    pictures = [np.asarray(Image.open(out / r["file_name"])).astype(int) for r in records]
    for picture in pictures:
        assert picture.shape == (160, 160, 3)
        red = (picture[..., 0] > 200) & (picture[..., 2] < 80)
        assert 0.04 < red.mean() < 0.5 and picture[~red][:, 2].mean() > 90
    assert not np.array_equal(pictures[0], pictures[1])
    before = (out / "00002.png").read_bytes()
    (out / "00002.png").unlink()
    scenes.main()
    assert (out / "00002.png").read_bytes() == before


def test_a_profile_gives_a_backward_pass_to_the_part_that_recorded_it(recipes):
    import profile_step
    from torch.profiler import ProfilerActivity, profile

    part, rest = torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)
    handles = profile_step._recorded(part, "vision side")
    weight = torch.randn(32, 16, requires_grad=True)
    product = profile_step._named(torch.mm, "token loss")
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        with torch.no_grad():
            rest(torch.randn(8, 64))  # records nothing
        product(rest(part(torch.randn(8, 64)).sigmoid()), weight).sum().backward()
    for handle in handles:
        handle.remove()
    total, seconds, calls = profile_step.shares(profiler.events())
    assert total == pytest.approx(sum(seconds.values())) and total > 0
    assert calls["vision side", "aten::addmm"] == 1 and calls["loop", "aten::addmm"] == 2
    assert calls["vision side", "AddmmBackward0"] == 1 and calls["loop", "AddmmBackward0"] == 1
    assert calls["loop", "SigmoidBackward0"] == 1 and calls["token loss", "MmBackward0"] == 1
    # Two products for each gradient of a layer, but none for the input of the first; inside the backward's part.
    assert calls["vision side", "aten::mm"] == 1 and calls["loop", "aten::mm"] == 2
    assert calls["token loss", "aten::mm"] == 3


def test_a_step_is_profiled_by_part_and_operator(recipes, tmp_path, monkeypatch, capsys):
    import profile_step
    import sized_models

    monkeypatch.setattr(profile_step, "MODELS", {"llava-100m": lambda: SMALL["llava"](sized_models)})
    command = ["profile_step.py", "--model", "llava-100m", "--inner-steps", "2", "--least", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    profile_step.main()
    found = json.loads((tmp_path / "profile-llava-100m.json").read_text())
    parts = found["share_by_part"]
    assert {*profile_step.PYTORCH, "loop", "heads", "pgd_linf_step_", "info_nce", "cosine_heads"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(1) and sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert 0 < found["pytorch_share"] < 1
    steps = [row for row in found["rows"] if row["part"] == "pgd_linf_step_" and row["operator"] == "(Python)"]
    assert [row["calls"] for row in steps] == [2]
    assert "by operator" in capsys.readouterr().out


def test_the_frontier_is_tabled_and_drawn(recipes, tmp_path, monkeypatch):
    import frontier

    def ran(row, budget, seed, robust):
        shares = {"acc_clean_whole_test_split": 0.9, "acc_robust": robust, "asr": 0.1}
        record = shares | {"settings": {"max_steps": 10}, "seconds_by_cpu": 5.0, "title": "as it was called"}
        path = tmp_path / "runs" / f"{row}-{budget}-seed{seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record | {"row": row, "budget": budget, "seed": seed}))

    for seed, robust in ((0, 0.7), (1, 0.8)):
        ran("cmai", "420-s", seed, robust)
    ran("half-r0", "420-s", 0, 0.6)
    ran("dropped-row", "500-steps", 0, 0.5)
    strength = tmp_path / "strength.json"
    defences = {d for _, names, _ in frontier.LINES.values() for d in names}
    rows = [{"defence": d, "seconds": 1000.0, "acc_robust": {"mean": 0.7}} for d in defences]
    strength.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(sys, "argv", ["frontier.py", "table", "--out", str(tmp_path), "--strength", str(strength)])
    frontier.main()
    lines = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert lines[0] == (
        "| 420-s | CMAI: S_c in the loss, 5 steps of 6 on S_c alone, anchored, R = 0, K = 4 | 2 | 90.0% \u00b1 0.0% | "
        "75.0% \u00b1 7.1% | 10.0% \u00b1 0.0% | 10 | 0.50 |"
    )
    assert [line.split(" | ")[1] for line in lines[1:]] == [frontier.ROWS["half-r0"][0], "as it was called"]
    drawn = ElementTree.fromstring((tmp_path / "frontier.svg").read_text())
    names = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text") if t.get("class", "").startswith("end")]
    assert sorted(names) == sorted({"CMAI", *(n for n, line in frontier.LINES.items() if line[1] or n == "bridge")})


def test_a_budget_in_seconds_pays_for_the_verifier(recipes):
    import frontier

    times = {"alone-r0": 0.5, "half-r0": 0.5, "fit": 20.0}
    assert frontier.steps_within("alone-r0", 100.0, times) == 160
    assert frontier.steps_within("half-r0", 100.0, times) == 200
