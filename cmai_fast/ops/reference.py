"""The operators in plain PyTorch: the definition of right, on any device and for every dtype the schemas allow.

Formulas and shapes are in the docstrings of `operators.py`. Nothing here is tuned except for memory: what would be
quadratic in the batch goes in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cmai_fast.ops.schema import compute_dtype

# Vectors no longer than this count as zero: their direction is rounding noise.
ZERO_NORM = 1e-12

# Elements of the largest temporary in the chunked loops: 4 MB of float32 logits, 8 MB of int64 hashes.
_CHUNK = 1 << 20


def _per_row(values: Tensor, image: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1) in the dtype of `image`."""
    return values.to(image.dtype).view(-1, *[1] * (image.dim() - 1))


def _per_channel(values: Tensor, image: Tensor) -> Tensor:
    """(C,) as (C, 1, ..., 1) in the dtype of `image`, whose dim 1 is C."""
    return values.to(image.dtype).view(-1, *[1] * (image.dim() - 2))


def _row_norm(image: Tensor) -> Tensor:
    """L2 norm of every row, (N, 1, ..., 1).

    Summed in float64: PyTorch's order of summation depends on the shape of the whole batch, and in float32 a row's
    result would show it.
    """
    dims = tuple(range(1, image.dim()))
    return torch.linalg.vector_norm(image, dim=dims, keepdim=True, dtype=torch.float64).to(image.dtype)


def _unit_rows(grad: Tensor) -> Tensor:
    """grad / ||grad|| per row; zero for rows whose gradient is zero or infinite.

    Divides by the largest element first: gradients of a confident model are often below 1e-23, whose squares are zero
    in float32.
    """
    peak = grad.abs().amax(dim=tuple(range(1, grad.dim())), keepdim=True)
    moves = (peak > 0) & peak.isfinite()
    scaled = torch.where(moves, grad, 0) / torch.where(moves, peak, 1)
    return scaled / torch.where(moves, _row_norm(scaled), 1)


def _nan_to_zero(grad: Tensor) -> Tensor:
    return torch.where(grad.isnan(), 0, grad)


def _write_step(
    new: Tensor, adv: Tensor, active: Tensor | None, model_input: Tensor | None, mean: Tensor | None, std: Tensor | None
) -> None:
    keep = None if active is None else ~active.view(-1, *[1] * (adv.dim() - 1))
    adv.copy_(new if keep is None else torch.where(keep, adv, new))
    if model_input is None:
        return
    if mean is not None and std is not None:
        new = (new - _per_channel(mean, new)) / _per_channel(std, new)
    new = new.to(model_input.dtype)
    model_input.copy_(new if keep is None else torch.where(keep, model_input, new))


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
    if adv.numel() == 0:
        return
    eps, step = _per_row(eps, adv), _per_row(step, adv)
    # The sign comes before the cast: a float64 gradient may be too small for the dtype of adv and still has a sign.
    new = adv + step * _nan_to_zero(grad).sign().to(adv.dtype)
    new = new.clamp(clean - eps, clean + eps).clamp(lower, upper)
    _write_step(new, adv, active, model_input, mean, std)


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
    if adv.numel() == 0:
        return
    eps, step = _per_row(eps, adv), _per_row(step, adv)
    grad = _nan_to_zero(grad).to(adv.dtype)
    if std is not None:
        grad = grad / _per_channel(std, grad)
    new = adv + step * _unit_rows(grad)
    delta = new - clean
    norm = _row_norm(delta)
    # Rows inside the ball keep their exact value: clean + (new - clean) would round it again at every step.
    outside = norm > eps
    new = torch.where(outside, clean + delta * (eps / torch.where(outside, norm, 1)), new).clamp(lower, upper)
    _write_step(new, adv, active, model_input, mean, std)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Logical right shift of int64, whose own shift copies the sign bit."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014) on int64, whose products wrap as uint64's do."""
    bits = (bits ^ _shift_right(bits, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    bits = (bits ^ _shift_right(bits, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
    return bits ^ _shift_right(bits, 31)


def _random_bits(sample_ids: Tensor, seed: int, count: int) -> Tensor:
    """(n, count + 1) int64 of 64 random bits: one SplitMix64 sequence per (seed, sample id).

    Columns 0 .. count-1 belong to the elements; the last is the row's own.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
    seeds = torch.full_like(sample_ids, seed)
    start = _mix(_mix(seeds + golden) ^ _mix(sample_ids))
    counter = torch.arange(1, count + 2, device=sample_ids.device, dtype=torch.int64)
    return _mix(start[:, None] + counter * golden)


def _linf_noise(bits: Tensor, eps: Tensor) -> Tensor:
    # An odd integer below 2^24 in absolute value: exact in float32, so that every backend can give the same bits.
    return ((_shift_right(bits[:, :-1], 40) << 1) + 1 - (1 << 24)).to(eps.dtype) * 2.0**-24 * eps


def _l2_noise(bits: Tensor, eps: Tensor) -> Tensor:
    high, low = (_shift_right(bits, 32).to(eps.dtype) + 0.5) * 2.0**-32, (bits & 0xFFFFFFFF).to(eps.dtype) * 2.0**-32
    gaussian = (-2 * high[:, :-1].log()).sqrt() * (2 * torch.pi * low[:, :-1]).cos()
    radius = eps * high[:, -1:] ** (1 / gaussian.shape[1])
    return gaussian * (radius / _row_norm(gaussian).clamp(min=ZERO_NORM))


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
    if adv.numel() == 0:
        return
    count = adv[0].numel()
    noise_of = _linf_noise if norm == "linf" else _l2_noise
    for rows in _row_chunks(adv.shape[0], count):
        noise = noise_of(_random_bits(sample_ids[rows], seed, count), eps[rows].to(adv.dtype)[:, None])
        adv[rows].copy_((clean[rows] + noise.view(clean[rows].shape)).clamp(lower, upper))


def _row_chunks(rows: int, row_size: int) -> Iterator[slice]:
    length = max(1, _CHUNK // max(1, row_size))
    return (slice(start, min(start + length, rows)) for start in range(0, rows, length))


def _cosine(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors (zero where a vector of the pair counts as zero) and the norms they were divided by."""
    dtype = compute_dtype(image, text)
    image, text = image.to(dtype), text.to(dtype)
    image_norm = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
    text_norm = torch.linalg.vector_norm(text, dim=-1, keepdim=True)
    # "<=" and not ">" negated: NaN must come through as NaN and not as a score of 0.
    zero = (image_norm <= ZERO_NORM) | (text_norm <= ZERO_NORM)
    image_norm, text_norm = torch.where(zero, 1, image_norm), torch.where(zero, 1, text_norm)
    return torch.where(zero, 0, image) / image_norm, torch.where(zero, 0, text) / text_norm, image_norm, text_norm


def cosine_heads(image: Tensor, text: Tensor) -> Tensor:
    image_unit, text_unit, _, _ = _cosine(image, text)
    # Rounding takes parallel vectors to 1.0000001; a score is a cosine.
    return (image_unit * text_unit).sum(-1).clamp(-1, 1)


def cosine_heads_backward(grad: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """d cos / d image = (text_unit - cos * image_unit) / ||image||, and the same with image and text exchanged."""
    image_unit, text_unit, image_norm, text_norm = _cosine(image, text)
    cosine = (image_unit * text_unit).sum(-1, keepdim=True)
    grad = grad.to(cosine.dtype)[..., None]
    grad_image = grad * (text_unit - cosine * image_unit) / image_norm
    grad_text = grad * (image_unit - cosine * text_unit) / text_norm
    return grad_image.to(image.dtype), grad_text.to(text.dtype)


def info_nce(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query, keys, scale)
    rows, count = query.shape[0], keys.shape[0]
    log_sum_exp = query.new_empty(rows, dtype=dtype)
    loss = query.new_zeros((), dtype=dtype)
    if rows == 0:
        return loss, log_sum_exp
    # On a GPU the comparison would wait for the device; there the gather below has its own assertion.
    if labels.device.type == "cpu":
        low, high = int(labels.min()), int(labels.max())
        torch._check(
            low >= 0 and high < count,
            lambda: f"labels hold {low if low < 0 else high}, expected row numbers of keys, 0 to {count - 1}",
        )
    keys, scale = keys.to(dtype), scale.to(dtype)
    for chunk in _row_chunks(rows, count):
        logits = scale * (query[chunk].to(dtype) @ keys.T)
        log_sum_exp[chunk] = logits.logsumexp(1)
        loss += (log_sum_exp[chunk] - logits.gather(1, labels[chunk, None]).squeeze(1)).sum()
    return loss / rows, log_sum_exp


def info_nce_backward(
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With R = softmax(scale * query @ keys.T) - onehot(labels), the gradients are scale/N * R @ keys for the query,
    scale/N * R.T @ query for the keys, and 1/N * sum((R @ keys) * query) for the scale."""
    dtype = compute_dtype(query, keys, scale)
    rows, count = query.shape[0], keys.shape[0]
    wide_keys, wide_scale = keys.to(dtype), scale.to(dtype)
    grad_query = torch.zeros_like(query)
    grad_keys = torch.zeros_like(wide_keys)
    grad_scale = torch.zeros_like(wide_scale)
    per_row = grad.to(dtype) / max(1, rows)
    for chunk in _row_chunks(rows, count):
        wide_query = query[chunk].to(dtype)
        residual = (wide_scale * (wide_query @ wide_keys.T) - log_sum_exp[chunk, None]).exp_()
        residual.scatter_add_(1, labels[chunk, None], residual.new_full((residual.shape[0], 1), -1))
        pulled = residual @ wide_keys
        grad_query[chunk] = (wide_scale * per_row * pulled).to(query.dtype)
        grad_keys += residual.T @ wide_query
        grad_scale += (pulled * wide_query).sum()
    return grad_query, (wide_scale * per_row * grad_keys).to(keys.dtype), (per_row * grad_scale).to(scale.dtype)
