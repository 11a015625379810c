"""The operators in plain PyTorch, which define the right result, on any device and for every dtype of the schemas.

Formulas and shapes are in the docstrings of `operators.py`. Only memory is tuned: temporaries that would be quadratic
in the batch are processed in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmai_fast.ops.schema import RATES, compute_dtype
from cmai_fast.ops.signatures import ApgdStep, PgdStep, RandomStart

# Vectors no longer than this count as zero: their direction is rounding noise.
ZERO_NORM = 1e-12

# Elements of the largest temporary in the chunked loops: 4 MB of float32 logits, 8 MB of int64 hashes.
_CHUNK = 1 << 20


def _per_row(values: Tensor, image: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1): numbers in the dtype of `image`, bools unchanged."""
    values = values if values.dtype == torch.bool else values.to(image.dtype)
    return values.view(-1, *[1] * (image.dim() - 1))


def _per_channel(values: Tensor, image: Tensor, patches: int) -> Tensor:
    """(C,) as (1, ...) of a row of `image`, in its dtype. A row is (patches, C, elements) in memory order."""
    row = image.shape[1:]
    run = row.numel() // (patches * values.shape[0])
    return values.to(image.dtype).view(1, -1, 1).expand(patches, -1, run).reshape(1, *row)


def _pixels(clean: Tensor, adv: Tensor) -> Tensor:
    """8-bit pixels scaled to [0, 1], others unchanged."""
    return clean.to(adv.dtype) / 255 if clean.dtype == torch.uint8 else clean


def _row_norm(image: Tensor, order: int = 2) -> Tensor:
    """Norm of every row, (N, 1, ..., 1).

    Summed in float64: PyTorch's order of summation depends on the shape of the whole batch, and in float32 a row's
    result would depend on it.
    """
    dims = tuple(range(1, image.dim()))
    return torch.linalg.vector_norm(image, order, dim=dims, keepdim=True, dtype=torch.float64).to(image.dtype)


def _unit_rows(grad: Tensor, order: int = 2) -> Tensor:
    """grad / ||grad|| per row; zero for rows whose gradient is zero or infinite.

    Divides by the largest element first: gradients of a confident model are often below 1e-23, whose squares are zero
    in float32.
    """
    peak = grad.abs().amax(dim=tuple(range(1, grad.dim())), keepdim=True)
    moves = (peak > 0) & peak.isfinite()
    scaled = torch.where(moves, grad, 0) / torch.where(moves, peak, 1)
    return scaled / torch.where(moves, _row_norm(scaled, order), 1)


def _pixel_gradient(grad: Tensor, adv: Tensor, std: Tensor | None, patches: int) -> Tensor:
    """The gradient in pixels, in the dtype of `adv`; NaN counts as 0."""
    grad = torch.where(grad.isnan(), 0, grad).to(adv.dtype)
    return grad if std is None else grad / _per_channel(std, adv, patches)


def _count_nonfinite(nonfinite: Tensor | None, grad: Tensor, active: Tensor | None) -> None:
    if nonfinite is not None:
        bad = (~grad.isfinite()).flatten(1).sum(1)
        nonfinite += bad if active is None else bad * active


def _set_rows(target: Tensor, new: Tensor, rows: Tensor | None) -> None:
    """target = new, in the rows where `rows` (N,) bool is True; None: all."""
    new = new.to(target.dtype)
    target.copy_(new if rows is None else torch.where(_per_row(rows, target), new, target))


def _normalised(adv: Tensor, mean: Tensor | None, std: Tensor | None, patches: int) -> Tensor:
    if mean is None or std is None:
        return adv
    return (adv - _per_channel(mean, adv, patches)) / _per_channel(std, adv, patches)


def _project(norm: str, image: Tensor, clean: Tensor, eps: Tensor, lower: float, upper: float) -> Tensor:
    """`image` onto the ball and then into the box; eps (N, 1, ..., 1)."""
    if norm == "linf":
        return image.clamp(clean - eps, clean + eps).clamp(lower, upper)
    delta = image - clean
    size = _row_norm(delta)
    # Rows inside the ball keep their exact value: clean + (image - clean) would round it again at every step.
    outside = size > eps
    return torch.where(outside, clean + delta * (eps / torch.where(outside, size, 1)), image).clamp(lower, upper)


def _ascend(
    norm: str, adv: Tensor, direction: Tensor, clean: Tensor, eps: Tensor, step: Tensor, lower: float, upper: float
) -> Tensor:
    """One step of ascent from `adv`, projected. The sign is taken of a `direction` of any dtype."""
    along = direction.sign().to(adv.dtype) if norm == "linf" else _unit_rows(direction)
    return _project(norm, adv + step * along, clean, eps, lower, upper)


def _pgd_step_(norm: str, c: PgdStep) -> None:
    adv = c.adv
    if adv.numel() == 0:
        return
    eps, step, clean = _per_row(c.eps, adv), _per_row(c.step, adv), _pixels(c.clean, adv)
    _count_nonfinite(c.nonfinite, c.grad, c.active)
    if norm == "linf" and c.velocity is None:
        # Not cast to the dtype of adv: a float64 gradient may be too small for it and still has a sign.
        direction = torch.where(c.grad.isnan(), 0, c.grad)
    else:
        direction = _pixel_gradient(c.grad, adv, c.std, c.patches)
    if c.velocity is not None:
        _set_rows(c.velocity, c.decay * c.velocity + _unit_rows(direction, 1), c.active)
        direction = c.velocity
    new = _ascend(norm, adv, direction, clean, eps, step, c.lower, c.upper)
    _set_rows(adv, new, c.active)
    if c.model_input is not None:
        _set_rows(c.model_input, _normalised(new, c.mean, c.std, c.patches), c.active)


def pgd_linf_step_(*args: Any, **kwargs: Any) -> None:
    _pgd_step_("linf", PgdStep(*args, **kwargs))


def pgd_l2_step_(*args: Any, **kwargs: Any) -> None:
    _pgd_step_("l2", PgdStep(*args, **kwargs))


def _apgd_step_(norm: str, c: ApgdStep) -> None:
    adv = c.adv
    if adv.numel() == 0:
        return
    eps, step, clean = _per_row(c.eps, adv), _per_row(c.step, adv), _pixels(c.clean, adv)
    _count_nonfinite(c.nonfinite, c.grad, None)
    _set_rows(c.top_adv, adv, c.improved)
    _set_rows(c.top_grad, c.grad, c.improved)
    _set_rows(adv, c.top_adv, c.restart)
    grad = torch.where(_per_row(c.restart, c.grad), c.top_grad, c.grad)
    direction = _pixel_gradient(grad, adv, c.std, c.patches)
    stepped = _ascend(norm, adv, direction, clean, eps, step, c.lower, c.upper)
    new = adv + c.momentum * (stepped - adv) + (1 - c.momentum) * (adv - c.previous)
    new = _project(norm, new, clean, eps, c.lower, c.upper)
    c.previous.copy_(new)
    if c.model_input is not None:
        c.model_input.copy_(_normalised(new, c.mean, c.std, c.patches))


def apgd_linf_step_(*args: Any, **kwargs: Any) -> None:
    _apgd_step_("linf", ApgdStep(*args, **kwargs))


def apgd_l2_step_(*args: Any, **kwargs: Any) -> None:
    _apgd_step_("l2", ApgdStep(*args, **kwargs))


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Logical right shift of int64, whose own shift copies the sign bit."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014) on int64, whose products wrap as uint64's do."""
    bits = (bits ^ _shift_right(bits, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    bits = (bits ^ _shift_right(bits, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
    return bits ^ _shift_right(bits, 31)


def _random_bits(sample_ids: Tensor, seed: int, count: int) -> Tensor:
    """(n, count + 1) int64, each of 64 random bits: one SplitMix64 sequence per (seed, sample id).

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


def random_start_(*args: Any, **kwargs: Any) -> None:
    c = RandomStart(*args, **kwargs)
    adv, clean = c.adv, c.clean
    if adv.numel() == 0:
        return
    count = adv[0].numel()
    noise_of = _linf_noise if c.norm == "linf" else _l2_noise
    for rows in _row_chunks(adv.shape[0], count):
        noise = noise_of(_random_bits(c.sample_ids[rows], c.seed, count), c.eps[rows].to(adv.dtype)[:, None])
        adv[rows].copy_((_pixels(clean[rows], adv) + noise.view(clean[rows].shape)).clamp(c.lower, c.upper))


def _row_chunks(rows: int, row_size: int) -> Iterator[slice]:
    length = max(1, _CHUNK // max(1, row_size))
    return (slice(start, min(start + length, rows)) for start in range(0, rows, length))


def _cosine(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors (zero where a vector of the pair counts as zero) and the norms they were divided by."""
    dtype = compute_dtype(image, text)
    image, text = image.to(dtype), text.to(dtype)
    image_norm = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
    text_norm = torch.linalg.vector_norm(text, dim=-1, keepdim=True)
    # "<=" instead of "not >": NaN must stay NaN and not become a score of 0.
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


def check_labels(labels: Tensor, count: int) -> None:
    # On a GPU the comparison would wait for the device; there indexing has its own assertion.
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        torch._check(
            low >= 0 and high < count,
            lambda: f"labels hold {low if low < 0 else high}, expected row numbers of keys, 0 to {count - 1}",
        )


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1)


def _left_out(labels: Tensor, groups: Tensor) -> Tensor:
    """(n, M) bool: the keys of the group of each row's own key, without that key. labels (n,), groups (M,)."""
    return (groups[labels, None] == groups).scatter_(1, labels[:, None], False)


def info_nce(
    query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, symmetric: bool = False, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query, keys, scale)
    rows, count = query.shape[0], keys.shape[0]
    row_lse = query.new_empty(rows, dtype=dtype)
    column_lse = query.new_full((count if symmetric else 0,), -torch.inf, dtype=dtype)
    loss = query.new_zeros((), dtype=dtype)
    if rows == 0:
        return loss, row_lse, column_lse
    check_labels(labels, count)
    keys, scale = keys.to(dtype), scale.to(dtype)
    for chunk in _row_chunks(rows, count):
        logits = (query[chunk].to(dtype) @ keys.T).mul_(scale)
        if groups is not None:
            logits.masked_fill_(_left_out(labels[chunk], groups), -torch.inf)
        row_lse[chunk] = logits.logsumexp(1)
        own = _own(logits, labels[chunk]).sum()
        loss += row_lse[chunk].sum() - own
        if symmetric:
            column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
            loss -= own
    if symmetric:
        loss = (loss + column_lse[labels].sum()) / 2
    return loss / rows, row_lse, column_lse


def whole_info_nce(
    query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, symmetric: bool, groups: Tensor | None
) -> Tensor:
    """The loss of `info_nce` over all logits at once, differentiable by PyTorch; at least one row."""
    check_labels(labels, keys.shape[0])
    dtype = compute_dtype(query, keys, scale)
    logits = (scale.to(dtype) * query.to(dtype)) @ keys.to(dtype).T
    if groups is not None:
        logits = logits.masked_fill(_left_out(labels, groups), -torch.inf)
    by_row = cross_entropy(logits, labels)
    if not symmetric:
        return by_row
    rows = torch.arange(len(query), device=query.device)
    return (by_row + cross_entropy(logits.T.index_select(0, labels), rows)) / 2


def info_nce_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With R = softmax of each row - onehot(labels), or in both directions the mean of that and of n_j * softmax of
    each column - onehot(labels), where n_j rows have the label j, and 0 where a key is left out, the gradients are
    scale/N * R @ keys for the query, scale/N * R.T @ query for the keys, and 1/N * sum((R @ keys) * query) for the
    scale."""
    dtype = compute_dtype(query, keys, scale)
    rows, count = query.shape[0], keys.shape[0]
    wide_keys, wide_scale = keys.to(dtype), scale.to(dtype)
    owners = torch.zeros_like(column_lse)
    if symmetric := column_lse.shape[0] > 0:
        owners.scatter_add_(0, labels, torch.ones_like(row_lse))
    grad_query, grad_keys = torch.zeros_like(query), torch.zeros_like(wide_keys)
    grad_scale = torch.zeros_like(wide_scale)
    per_row = grad.to(dtype) / max(1, rows)
    for chunk in _row_chunks(rows, count):
        wide_query = query[chunk].to(dtype)
        logits = (wide_query @ wide_keys.T).mul_(wide_scale)
        by_column = (logits - column_lse).exp_().mul_(owners) if symmetric else None
        residual = logits.sub_(row_lse[chunk, None]).exp_()
        if by_column is not None:
            residual.add_(by_column).div_(2)
        if groups is not None:
            residual.masked_fill_(_left_out(labels[chunk], groups), 0)
        residual.scatter_add_(1, labels[chunk, None], residual.new_full((residual.shape[0], 1), -1))
        pulled = residual @ wide_keys
        grad_scale += (pulled * wide_query).sum()
        grad_query[chunk] = pulled.mul_(wide_scale * per_row)
        grad_keys.addmm_(residual.T, wide_query)
    return grad_query, grad_keys.mul_(wide_scale * per_row).to(keys.dtype), (per_row * grad_scale).to(scale.dtype)


def gated_activation(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Tensor:
    wide = x.to(compute_dtype(x))
    value = wide * torch.sigmoid(RATES[kind] * wide)
    return (value if other is None else value * other).to(x.dtype).contiguous()


def gated_activation_backward(grad: Tensor, x: Tensor, other: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(r * x): grad_x = grad * other * (s + x * r * s * (1 - s)), grad_other = grad * x * s."""
    wide, rate = x.to(compute_dtype(x)), RATES[kind]
    sigmoid = torch.sigmoid(rate * wide)
    # sigmoid(-z) for 1 - sigmoid(z), of whose digits little would be left for large z.
    slope = sigmoid + wide * (rate * (sigmoid * torch.sigmoid(-rate * wide)))
    grad_x = (grad * slope if other is None else grad.to(wide.dtype) * other * slope).to(x.dtype).contiguous()
    if other is None:
        return grad_x, x.new_empty(0)
    return grad_x, (grad * (wide * sigmoid)).to(x.dtype).contiguous()
