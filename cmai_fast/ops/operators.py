"""The public operators: what they compute, in which shapes and units, and what they refuse.

All raise RuntimeError for wrong shapes, dtypes or devices, naming the value, and can be traced by `torch.compile`.
`eps` and `step` are in units of the [0, 1] pixel range.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pgd_linf_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    active: Tensor | None = None,
    *,
    model_input: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    """One ascent step in the L_inf ball (Madry et al. 2018, section 2.1), written into `adv`:

        adv = clamp(clamp(adv + step * sign(grad), clean - eps, clean + eps), lower, upper)

    Args:
        adv: (N, ...) float32 or float64 pixels in [lower, upper], mutated.
        grad: like adv, any float dtype: the gradient of what is maximised with respect to the model's input. Its sign
            is that of the gradient in pixels, since std > 0. A NaN counts as 0.
        clean: like adv: the images around which the ball lies. Finite, as adv.
        eps, step: (N,) radius and step size per row, float.
        active: (N,) bool; rows that are False are left untouched in adv and in model_input.
        model_input: like adv, any float dtype, mutated: receives (adv - mean) / std, what the model sees.
        mean, std: (C,) per channel (dim 1 of adv), float; both or neither (then 0 and 1).
        lower, upper: the pixel box.
    """
    torch.ops.cmai_fast.pgd_linf_step_(
        adv, grad, clean, eps, step, active, model_input=model_input, mean=mean, std=std, lower=lower, upper=upper
    )


def pgd_l2_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    active: Tensor | None = None,
    *,
    model_input: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    """One ascent step in the L2 ball (Madry et al. 2018, section 2.1), written into `adv`, norms taken over a row:

        g = grad / std;  delta = adv + step * g / ||g|| - clean;  adv = clamp(clean + delta * min(1, eps / ||delta||))

    Args are those of `pgd_linf_step_`. `grad` is divided by std (the chain rule from the model's input to pixels). A
    NaN in it counts as 0; a row whose gradient is zero or has an infinite element does not move, but is still
    projected. A gradient of 1e-30 has a direction as any other. The clamp to the box comes last and only shortens
    delta, since clean lies in the box; rounding may leave ||delta|| above eps by 2^-24 * sqrt(elements of a row).
    """
    torch.ops.cmai_fast.pgd_l2_step_(
        adv, grad, clean, eps, step, active, model_input=model_input, mean=mean, std=std, lower=lower, upper=upper
    )


def random_start_(
    adv: Tensor,
    clean: Tensor,
    eps: Tensor,
    sample_ids: Tensor,
    seed: int,
    norm: str,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    """A random point of the ball, clamped to the box, written into `adv`: adv = clamp(clean + noise, lower, upper).

    The noise is a hash of (seed, sample id, index of the element), so a sample's start does not depend on the batch it
    is in, nor on the device's generator. Two rows with one id have the same noise.

    Args:
        adv: (N, ...) float32 or float64, mutated; its old values are not read.
        clean: like adv.
        eps: (N,) radius per row, float.
        sample_ids: (N,) int64.
        seed: any int64; another restart takes another seed.
        norm: "linf": uniform in (-eps, eps) per element. "l2": uniform in the volume of the ball: the direction of a
            Gaussian vector, the radius eps * u^(1/d) for d elements a row (Muller 1959).
        lower, upper: the pixel box.
    """
    torch.ops.cmai_fast.random_start_(adv, clean, eps, sample_ids, seed, norm, lower, upper)


def cosine_heads(image: Tensor, text: Tensor) -> Tensor:
    """The cosine of N pairs of vectors under H heads at once: S_c[n, h] = <image[n, h], text[n, h]> / (||.|| ||.||).

    Args:
        image, text: (N, H, D), any float dtype. Differentiable once in both.

    Returns:
        (N, H) in [-1, 1], float32 (float64 where an input is). A vector of norm 1e-12 or less counts as zero: its score
        is 0 and its pair's gradient zero. NaN stays NaN, in its own pair.
    """
    return torch.ops.cmai_fast.cosine_heads(image, text)


def info_nce(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """The InfoNCE loss (van den Oord et al. 2018, eq. 4): mean cross-entropy of scale * query @ keys.T against labels.

    The N x M logits are never stored: forward and backward compute them in chunks of rows, so memory is O((N + M) D).
    Products and sums are float32 (float64 where an input is).

    Args:
        query: (N, D), any float dtype; normalising is the caller's. Differentiable once, as keys and scale.
        keys: (M, D).
        labels: (N,) int64: the row of keys that each query belongs to.
        scale: 0-d tensor, 1 / temperature.

    Returns:
        0-d loss, float32 (float64 where an input is); 0 with zero gradients when N = 0.

    Raises:
        RuntimeError: also for a label outside 0 .. M-1 (on a GPU: its own device-side assertion).
    """
    return torch.ops.cmai_fast.info_nce(query, keys, labels, scale)[0]
