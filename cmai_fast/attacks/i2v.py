"""I2V (arXiv 2112.05379): images leave their own features in the middle of an encoder, and so do frames of videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.restarts import Restart, restarted
from cmai_fast.attacks.state import AttackResult, random_start
from cmai_fast.attacks.victim import Victim
from cmai_fast.bridge import frozen
from cmai_fast.pixels import check_pixels
from cmai_fast.threat import ThreatModel

# Images (n, ...) in [0, 1] to the features (n, ...) of each layer, differentiable.
Features = Callable[[Tensor], "Sequence[Tensor]"]


def layers_of(modules: Sequence[nn.Module], layers: Sequence[int] = ()) -> list[nn.Module]:
    """Blocks of an image encoder, by number from 0; none named: the one in the middle.

    The blocks are the longest list of modules (`ModuleList` or `Sequential`) in these.

    Raises:
        ValueError: there is no such list, or it has no such block.
    """
    lists = [m for root in modules for m in root.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    if not lists:
        raise ValueError(
            f"{', '.join(type(m).__name__ for m in modules)} has no list of blocks, among which a middle one could be "
            "found; give the features by a function (`i2v_frames`)"
        )
    blocks = list(max(lists, key=len))
    if outside := [k for k in layers if not 0 <= k < len(blocks)]:
        raise ValueError(f"layers has {outside[0]}; the encoder has the blocks 0 to {len(blocks) - 1}")
    return [blocks[k] for k in layers or [(len(blocks) - 1) // 2]]


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside: the outputs of these blocks, in the order in which they run."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, (tuple, list)) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def cosines(features: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """(n, layers): the cosine of each image's features with those of the clean one, all of a layer in one vector."""
    pairs = zip(features, clean, strict=True)
    return torch.stack([F.cosine_similarity(_wide(a), _wide(b), dim=1) for a, b in pairs], 1)


def _wide(features: Tensor) -> Tensor:
    return features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))


def turn_away(
    clean: Tensor,
    features: Features,
    eps: float,
    steps: int,
    rate: float,
    start: Tensor,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Images in the L_inf ball around `clean` (n, ...) after `steps` of Adam, which minimise the weighted cosine.

    Args:
        start: (n, ...) the perturbation at the beginning.
        watch: is called with the gradient of every step.
    """
    with torch.no_grad():
        own = [f.detach() for f in features(clean)]
    delta = start.detach().clone()
    optimizer = torch.optim.Adam([delta], lr=rate)
    weights = clean.new_full((len(clean), len(own)), 1 / len(own))
    for _ in range(steps):
        leaf = delta.detach().requires_grad_()
        at = cosines(features(clean + leaf), own)
        (grad,) = torch.autograd.grad((weights * at).sum(), leaf)
        if watch is not None:
            watch(grad)
        weights = at.detach().softmax(1)  # a layer that has not turned yet counts more
        delta.grad = grad.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
        delta.copy_((clean + delta.clamp(-eps, eps)).clamp(0, 1) - clean)
    return (clean + delta).clamp(0, 1)


def i2v_frames(
    frames: Tensor,
    encoders: Sequence[Features],
    *,
    eps: float = 16 / 255,
    steps: int = 60,
    rate: float = 0.005,
    start: float = 0.01 / 255,
    batch: int = 64,
) -> Tensor:
    """Adversarial videos for a model that is never asked: each frame leaves its own features in image encoders.

    Args:
        frames: (N, T, 3, H, W) in [0, 1].
        encoders: each takes frames (n, 3, H, W) in [0, 1] and gives the features (n, ...) of some layers
            (`layer_features`). With several layers in all, their cosines are weighted by the softmax of the last ones
            (ENS-I2V).
        eps: the L_inf radius.
        rate: of Adam. start: where every pixel of the perturbation begins.
        batch: frames at a time; the result does not depend on it.

    Returns:
        Frames like `frames`, at least float32, inside the ball.

    Raises:
        ValueError: frames of another shape, or pixels outside [0, 1].
    """
    if frames.dim() != 5:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; expected (N, T, 3, H, W)")
    check_pixels(frames)

    def features(images: Tensor) -> list[Tensor]:
        return [f for encoder in encoders for f in encoder(images)]

    with torch.inference_mode(False), torch.enable_grad():
        flat = frames.detach().flatten(0, 1).to(torch.promote_types(frames.dtype, torch.float32)).clone()
        found = [
            turn_away(part, features, eps, steps, rate, torch.full_like(part, start)) for part in flat.split(batch)
        ]
        return torch.cat(found).view(frames.shape) if found else flat.view(frames.shape)


def layer_features(encoder: nn.Module, read: Callable[[Tensor], Any], layers: Sequence[int] = ()) -> Features:
    """Images in [0, 1] to the outputs of these blocks of an encoder; none named: the one in the middle.

    `read`: runs the encoder on images in [0, 1]; its result is not used. The encoder is frozen meanwhile.
    """
    blocks = layers_of([encoder], layers)

    def features(images: Tensor) -> list[Tensor]:
        graph = torch.is_grad_enabled()
        with frozen(encoder), torch.set_grad_enabled(graph), outputs_of(blocks) as found:
            read(images)
        return found

    return features


def _refuse(rate: float = 0.0, start: float = 0.0, layers: tuple[str, ...] = ()) -> None:
    for name, value in (("rate", rate), ("start", start)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"i2v: {name} is {value}; expected a finite number of at least 0")
    if bad := [text for text in layers if not str(text).isdecimal()]:
        raise ValueError(f"i2v: layers has {bad[0]!r}; expected numbers of blocks from 0, such as layers=1,2")


@attack("i2v", label="I2V", steps=60, threats=("linf",), refuse=_refuse)
def i2v(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    rate: float = 0.005,
    start: float = 0.01 / 255,
    layers: tuple[str, ...] = (),
) -> AttackResult:
    """Minimises cos(f_l(x + delta), f_l(x)) at a block l in the middle of the image encoder, by Adam.

    No label and no text is used. Restarts after the first begin at random points.

    Args:
        rate: of Adam, in the [0, 1] pixel range.
        start: where every pixel of the perturbation begins.
        layers: blocks from 0; several are weighted per image by the softmax of their last cosines. None named: the one
            in the middle.
    """
    blocks = layers_of(victim.bridge.vision_side, [int(text) for text in layers])

    def climb(run: Restart) -> None:
        at, rows = run.clean[run.rows], run.rows
        if run.number:
            begin = at.clone()
            random_start(victim, begin, at, run.eps[rows], run.sample_ids[rows], rows, run.seed, "linf")
            begin -= at
        else:
            begin = torch.full_like(run.clean, start)
            begin = (begin if victim.layout is None else victim.layout.only(begin))[rows]

        def count(grad: Tensor) -> None:
            run.tally.add(grad, (~grad.isfinite()).flatten(1).sum(1), rows)
            victim.passes.vision_forward += 1
            victim.passes.vision_backward += 1

        adv = turn_away(at, lambda x: _features(victim, blocks, x, rows), threat.eps, steps, rate, begin, count)
        with torch.no_grad():
            model_input = victim.space.to_model(adv)
            found = run.victim(model_input, rows, lambda f, o, v, r: -_turned(victim, blocks, at, adv, rows))
            run.best.offer(adv, model_input, found, rows)

    return restarted(
        climb, victim, clean, threat, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=None, gradient=None,
        early_stop=False,
    )  # fmt: skip


def _features(victim: Victim, blocks: Sequence[nn.Module], pixels: Tensor, rows: Tensor) -> list[Tensor]:
    """Outputs of the blocks for images (n, ...) of `rows`, by block (n, ...).

    Where a sample is tiles or patches, the encoder packs those of a batch together, so samples go one by one.
    """
    model_input = victim.space.to_model(pixels)
    if victim.layout is None:
        with outputs_of(blocks) as found:
            victim.encode(model_input, rows)
        return found
    parts = []
    for k in range(len(pixels)):
        with outputs_of(blocks) as found:
            victim.encode(model_input[k : k + 1], rows[k : k + 1])
        parts.append([f.flatten() for f in found])
    return [nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*parts, strict=True)]


def _turned(victim: Victim, blocks: Sequence[nn.Module], clean: Tensor, adv: Tensor, rows: Tensor) -> Tensor:
    return cosines(*(_features(victim, blocks, pixels, rows) for pixels in (adv, clean))).mean(1)
