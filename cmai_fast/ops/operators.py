"""The public operators, with formulas, shapes, units and errors.

All raise RuntimeError for wrong shapes, dtypes or devices, naming the value, and `torch.compile` can trace them.
`eps` and `step` are in units of the [0, 1] pixel range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmai_fast.ops import autograd
from cmai_fast.ops.backend import call, chosen_backend, is_plain
from cmai_fast.ops.reference import whole_info_nce
from cmai_fast.ops.schema import check_info_nce
from cmai_fast.ops.signatures import ApgdStep, PgdStep, RandomStart, public

# On a CPU, up to so many logits take less time at once, with PyTorch's own gradients, than by the operator, which then
# is mostly Python: 0.6 times for 64 x 64 (d = 128), 0.8 times for 256 x 256 and 1.1 times for 512 x 512 (both d = 256;
# forward and backward in both directions, with groups; AMD EPYC, ATEN_CPU_CAPABILITY=avx2, one thread).
_FEW_LOGITS = 1 << 16

pgd_linf_step_ = public("pgd_linf_step_", PgdStep, call("pgd_linf_step_"))
pgd_linf_step_.__doc__ = """One ascent step in the L_inf ball (Madry et al. 2018, section 2.1), written into `adv`:

        adv = clamp(clamp(adv + step * sign(grad), clean - eps, clean + eps), lower, upper)

    Args:
        adv: (N, ...) float32 or float64 pixels in [lower, upper], mutated.
        grad: like adv, any float dtype: the gradient of the maximised loss with respect to the model's input. Its sign
            is that of the gradient in pixels, since std > 0. A NaN counts as 0.
        clean: like adv, or uint8, which stands for clean / 255: the images around which the ball lies. Finite, as adv.
        eps, step: (N,) radius and step size per row, float.
        active: (N,) bool; rows with False are not written.
        model_input: like adv, any float dtype, mutated: receives (adv - mean) / std, the model's input.
        velocity: like adv, mutated: the momentum of MI-FGSM (Dong et al. 2018, eq. 6), zero at first. It becomes
            decay * velocity + g / ||g||_1 with the gradient g in pixels, and the step follows it instead of grad. A
            row whose gradient is zero or has an infinite element adds nothing.
        decay: of the velocity, at least 0.
        nonfinite: (N,) int64, mutated: the number of NaN and infinite elements in each row of grad is added.
        mean, std: (C,) per channel, float; both or neither (then 0 and 1).
        patches: how many runs of all C channels a row has in memory: 1 for images (N, C, H, W), L for flattened patches
            (N, L, C * h * w) or (N, L, C, h, w), H * W for (N, H, W, C).
        lower, upper: the pixel box.
    """


pgd_l2_step_ = public("pgd_l2_step_", PgdStep, call("pgd_l2_step_"))
pgd_l2_step_.__doc__ = """One ascent step in the L2 ball (Madry et al. 2018, section 2.1), written into `adv`.

    Norms are taken over a row:

        g = grad / std;  delta = adv + step * g / ||g|| - clean;  adv = clamp(clean + delta * min(1, eps / ||delta||))

    Args are those of `pgd_linf_step_`. `grad` is divided by std (the chain rule from the model's input to pixels). A
    NaN in it counts as 0; a row whose gradient is zero or has an infinite element does not move, but is still
    projected. A gradient of 1e-30 has a direction like any other. The clamp to the box comes last and only shortens
    delta, since clean lies in the box; rounding may leave ||delta|| above eps by 2^-24 * sqrt(elements of a row).
    """


apgd_linf_step_ = public("apgd_linf_step_", ApgdStep, call("apgd_linf_step_"))
apgd_linf_step_.__doc__ = """One iteration of Auto-PGD in the L_inf ball, with its bookkeeping, in one pass
    (Croce and Hein 2020, algorithm 1):

        top_adv, top_grad = adv, grad            in rows that improved
        adv, g            = top_adv, top_grad    in rows that restart (after the line above), else adv, grad
        z        = P(adv + step * sign(g))
        previous = P(adv + momentum * (z - adv) + (1 - momentum) * (adv - previous))

    P projects onto the ball and the box. `previous` holds the point before adv on entry and the one after it on return:
    the caller swaps the two names, so nothing is copied.

    Args:
        adv, previous: (N, ...) float32 or float64, mutated.
        grad: like adv, any float dtype: the gradient at adv with respect to the model's input.
        top_adv, top_grad: like adv and like grad, mutated: the point of highest loss so far and its gradient.
        improved, restart: (N,) bool.
        momentum: alpha of the paper: 0.75, and 1 in the first iteration.
        clean, eps, step, model_input, nonfinite, mean, std, patches, lower, upper: as in `pgd_linf_step_`; model_input
            receives the new point.
    """


apgd_l2_step_ = public("apgd_l2_step_", ApgdStep, call("apgd_l2_step_"))
apgd_l2_step_.__doc__ = (
    """`apgd_linf_step_` in the L2 ball: the direction is g / ||g|| of the gradient in pixels, as in `pgd_l2_step_`."""
)


random_start_ = public("random_start_", RandomStart, call("random_start_"))
random_start_.__doc__ = """A random point of the ball, clamped to the box, written into `adv`:

        adv = clamp(clean + noise, lower, upper)

    The noise is a hash of (seed, sample id, index of the element), so a sample's start depends neither on its batch
    nor on the device's generator. Two rows with the same id have the same noise.

    Args:
        adv: (N, ...) float32 or float64, mutated; its old values are not read.
        clean: like adv, or uint8, which stands for clean / 255.
        eps: (N,) radius per row, float.
        sample_ids: (N,) int64.
        seed: any int64; use another seed for another restart.
        norm: "linf": uniform in (-eps, eps) per element. "l2": uniform in the volume of the ball: the direction of a
            Gaussian vector, the radius eps * u^(1/d) for d elements per row (Muller 1959).
        lower, upper: the pixel box.
    """


def cosine_heads(image: Tensor, text: Tensor) -> Tensor:
    """The cosine of N pairs of vectors under H heads at once: S_c[n, h] = <image[n, h], text[n, h]> / (||.|| ||.||).

    Args:
        image, text: (N, H, D), any float dtype. Differentiable once in both.

    Returns:
        (N, H) in [-1, 1], float32 (float64 if an input is). A vector of norm 1e-12 or less counts as zero: its score
        is 0 and its pair's gradient zero. NaN stays NaN, in its own pair.
    """
    return torch.ops.cmai_fast.cosine_heads(image, text)


def info_nce(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    symmetric: bool = False,
    groups: Tensor | None = None,
) -> Tensor:
    """The InfoNCE loss (van den Oord et al. 2018, eq. 4): mean cross-entropy of scale * query @ keys.T against labels.

    The N x M logits are not stored, unless they are few (256 x 256) and on a CPU: forward and backward compute them in
    chunks of rows, so memory is O((N + M) D). Products and sums are float32 (float64 where an input is).

    Args:
        query: (N, D), any float dtype; normalised by the caller if wanted. Differentiable once, like keys and scale.
        keys: (M, D); with negatives gathered from other ranks, M > N.
        labels: (N,) int64: the row of keys that each query belongs to.
        scale: 0-d tensor, 1 / temperature.
        symmetric: the mean of both directions (CLIP, Radford et al. 2021, figure 3): over the keys for each query, and
            for each query's own key over the queries. The logits are computed once for both.
        groups: (M,) int64: other keys of the group of a query's own key (the same text once more) are no negatives for
            it: their logits are -inf, in both directions. None: every other key is a negative.

    Returns:
        0-d loss, float32 (float64 where an input is); 0 with zero gradients when N = 0.

    Raises:
        RuntimeError: also for a label outside 0 .. M-1 (on a GPU: its own device-side assertion).
    """
    few = query.dim() == keys.dim() == 2 and 0 < len(query) * len(keys) <= _FEW_LOGITS
    automatic = query.device.type == "cpu" and chosen_backend() == "automatic"
    if few and automatic and is_plain(query) and not torch.is_autocast_enabled("cpu"):
        check_info_nce(query, keys, labels, scale, symmetric, groups)
        return whole_info_nce(query, keys, labels, scale, symmetric, groups)
    return torch.ops.cmai_fast.info_nce(query, keys, labels, scale, symmetric, groups)[0]


def gated_activation(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Tensor:
    """The activation of an MLP, times the other branch of a gated one: x * sigmoid(r * x) * other.

    Forward and backward are one pass over memory each, and only x and other are stored. Inside is float32 (float64 for
    float64), rounded once, so half-precision results are not those of the separate operations, but closer to the exact
    ones. An element's result does not depend on the others.

    Args:
        x: any shape, any float dtype. Differentiable once, like other.
        other: like x, of the same shape and dtype; None: 1.
        kind: "silu", r = 1 (Hendrycks and Gimpel 2016), or "quick_gelu", r = 1.702 (the same, section 2; CLIP's).

    Returns:
        Like x, contiguous.
    """
    return autograd.gated_activation(x, other, kind)
