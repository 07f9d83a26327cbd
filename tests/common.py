"""What every test file shares: random problems, the float64 truth and the tolerance rule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from alpkd_fast import ALPOutput

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPE_PAIRS = ("f64-f64", "f32-f32", "bf16-bf16", "f16-f16", "f32-bf16", "bf16-f32", "f16-f32", "bf16-f16", "f64-f32")


def dtype_pair(name: str) -> tuple[torch.dtype, torch.dtype]:
    student, teacher = name.split("-")
    return DTYPES[student], DTYPES[teacher]


def hidden_states(layers: int, lead, D: int, dtype=torch.float32, seed: int = 0, device="cpu") -> list[Tensor]:
    """``layers`` random tensors (*lead, D) that require grad."""
    generator = torch.Generator().manual_seed(1000 * seed + layers)
    shape = (*lead, D)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(layers)]
    return [v.to(device, dtype).requires_grad_() for v in values]


def both_sides(m: int, n: int, lead, D: int, dtypes: str = "f32-f32", seed: int = 0, device="cpu"):
    student, teacher = dtype_pair(dtypes)
    return (
        hidden_states(m, lead, D, student, 2 * seed, device),
        hidden_states(n, lead, D, teacher, 2 * seed + 1, device),
    )


# A layer map and, per layer that is not finite, the student and the teacher layers that it may reach.
REACH_MAP = [(0, 1), (1, 2), (3, 4)]
REACH = {
    ("teacher", 0): ([0], [0, 1]),
    ("teacher", 1): ([0, 1], [0, 1, 2]),
    ("teacher", 4): ([2], [3, 4]),
    ("student", 0): ([0], [0, 1]),
    ("student", 2): ([2], [3, 4]),
}


# Pooling, row weights and, of six sequences of five, the positions whose gradients may be other than zero. A weight
# that is too small for float16 counts, and a sequence without weights is compared nowhere.
_WEIGHTS = torch.tensor([[1, 1, 0, 2, 0], [0, 1, 1, 1e-8, 0], [0] * 5, [1] * 5, [0, 0, 0, 0, 1], [3, 0, 0, 0, 0]])
SCALED_ROWS = [
    ("cls", None, [0] * 6),
    ("last", None, [4] * 6),
    ("last", _WEIGHTS.view(2, 3, 5), [3, 3, 0, 4, 4, 0]),
    ("last", _WEIGHTS.view(2, 3, 5) > 0, [3, 3, 0, 4, 4, 0]),
]


# ---- The truth: the formulas of the paper, row by row and layer by layer ------------------------------


def spec_loss(
    student, teacher, mask=None, *, pooling="token", layer_map="all", scale=None, normalize=False,
    detach_attention=False, layer_weights=None, proj_weight=None, proj_bias=None, reduction="mean", normalizer=None,
    probe=None,
) -> ALPOutput:  # fmt: skip
    """The loss in the dtype of its inputs, written apart from the package; ``layer_map`` is "all" or a table.

    ``probe`` receives the largest score, how many times larger than e the terms of this difference are, and the scale
    with an element for each score.
    """
    dtype = student[0].dtype
    m, n, D = len(student), len(teacher), student[0].shape[-1]
    mask = torch.ones(student[0].shape[:-1]) if mask is None else mask
    weights = mask.to(student[0].device, dtype)
    rows_s, mu = _pool(student, weights, pooling)
    rows_t, _ = _pool(teacher, weights, pooling)
    counted = mu > 0  # a row of weight 0 is not read
    rows_s, rows_t, counted_mu = [s[counted] for s in rows_s], [t[counted] for t in rows_t], mu[counted]
    tau = torch.as_tensor(D**-0.5 if scale is None else scale, dtype=dtype, device=mu.device).expand(m, len(mu), n)
    probe = {} if probe is None else probe
    probe |= {"scores": 0.0, "lost": 0.0, "tau": tau}
    total = mu.sum()
    N = 1.0 if reduction == "sum" else m * D * (total if normalizer is None else normalizer)
    losses, entropies, attention = [], [], torch.zeros(m, len(mu), n, dtype=dtype, device=mu.device)
    for i, s in enumerate(rows_s):
        omega = 1.0 if layer_weights is None else float(layer_weights[i])
        if omega == 0 or not counted.any():
            losses.append(sum(x.sum() * 0 for x in (*rows_s, *rows_t, tau)))
            entropies.append(torch.zeros((), dtype=dtype, device=mu.device))
            continue
        allowed = list(range(n)) if isinstance(layer_map, str) else list(layer_map[i])
        targets = [_project(rows_t[j], proj_weight, proj_bias, i) for j in allowed]
        z = tau[i, counted][:, allowed] * torch.stack([(s * t).sum(-1) for t in targets], -1)
        probe["scores"] = max(probe["scores"], z.abs().max().item())
        weight = torch.exp(z - z.detach().amax(-1, keepdim=True))
        a = weight / weight.sum(-1, keepdim=True)
        a = a.detach() if detach_attention else a
        combined = sum(a[:, k, None] * t for k, t in enumerate(targets))
        whole, combined = (_unit(s), _unit(combined)) if normalize else (s, combined)
        e = whole - combined
        probe["lost"] = max(probe["lost"], (whole.abs().max() / e.abs().max().clamp_min(1e-300)).item())
        losses.append(omega * (counted_mu * (e * e).sum(-1)).sum() / N)
        a = a.detach()
        for k, j in enumerate(allowed):
            attention[i, counted, j] = a[:, k]
        entropies.append((counted_mu * -(a * a.clamp_min(1e-300 if dtype == torch.float64 else 1e-38).log()).sum(-1)
                          ).sum() / total)  # fmt: skip
    loss = sum(losses)
    shape = student[0].shape[:-1] if pooling == "token" else student[0].shape[:-2]
    return ALPOutput(loss, torch.stack(losses).detach(), attention.reshape(m, *shape, n), torch.stack(entropies))


def _project(t, weight, bias, i):
    if weight is None:
        return t
    per_layer = weight.dim() == 3
    return linear(t, weight[i] if per_layer else weight, bias[i] if bias is not None and per_layer else bias)


def _unit(x):
    return x / x.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()


def _pool(layers, weights, pooling):
    """Rows (R, D) of every layer, and their weights (R,); one sequence after the other."""
    D = layers[0].shape[-1]
    if pooling == "token":
        return [h.reshape(-1, D) for h in layers], weights.reshape(-1)
    S = weights.shape[-1]
    sequences, weights = [h.reshape(-1, S, D) for h in layers], weights.reshape(-1, S)
    if pooling == "cls":
        return [h[:, 0] for h in sequences], weights[:, 0]
    used = [[k for k in range(S) if weights[b, k] > 0] for b in range(len(weights))]
    mu = torch.tensor([float(bool(u)) for u in used], dtype=weights.dtype, device=weights.device)
    if pooling == "last":
        last = [u[-1] if u else 0 for u in used]
        return [torch.stack([h[b, k] for b, k in enumerate(last)]) for h in sequences], mu
    pooled = []
    for h in sequences:
        rows = []
        for b, u in enumerate(used):
            share = weights[b] / weights[b].sum()
            rows.append(sum((share[k] * h[b, k] for k in u), start=h.new_zeros(D)))
        pooled.append(torch.stack(rows))
    return pooled, mu


# ---- Values and gradients of one call -----------------------------------------------------------------


def evaluate(call, student, teacher, mask=None, *, grad: float = 1.0, **options) -> dict[str, Tensor]:
    """Outputs and gradients of ``call`` for an incoming gradient ``grad``, by name; those of layers are stacked."""
    student, teacher = [_leaf(s) for s in student], [_leaf(t) for t in teacher]
    options = {k: _leaf(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    output = call(student, teacher, mask, **options)
    inputs = {"d_student": student, "d_teacher": teacher}
    inputs |= {f"d_{k}": [v] for k, v in options.items() if isinstance(v, Tensor) and v.requires_grad}
    wanted = [x for layers in inputs.values() for x in layers if x.requires_grad]
    if wanted:
        torch.autograd.backward(output.loss, torch.full_like(output.loss, grad), inputs=wanted)
    values = output._asdict()
    for name, layers in inputs.items():
        if given := [torch.zeros_like(x) if x.grad is None else x.grad for x in layers if x.requires_grad]:
            values[name] = torch.stack(given)
    return {name: value.detach() for name, value in values.items()}


def assert_reaches(layer, got: dict[str, Tensor], clean: dict[str, Tensor], row: int) -> None:
    """Assert that what is not finite in the row of a layer of REACH is in the results it may reach, and in no other."""
    students, teachers = REACH[layer]
    for name, reached in (("layer_losses", students), ("d_student", students), ("d_teacher", teachers)):
        place = () if name == "layer_losses" else (row,)
        for i, (value, before) in enumerate(zip(got[name], clean[name], strict=True)):
            if i in reached:
                assert not bool(torch.isfinite(value[place]).all()), f"{name}[{i}] hides it"
                value[place] = before[place]
            assert torch.equal(value, before), f"it reached {name}[{i}]"


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _cast(x, dtype):
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if floating else x


def in_dtype(dtype, student, teacher, mask=None, **options) -> dict[str, Tensor]:
    """``spec_loss`` in a dtype, with what its probe receives and the sum of |d loss / d score * score| / scale."""
    student, teacher = [_cast(s, dtype) for s in student], [_cast(t, dtype) for t in teacher]
    probe = {}

    def probed(*args, **kwargs):
        output = spec_loss(*args, **kwargs, probe=probe)
        if probe["tau"].requires_grad:
            probe["tau"].retain_grad()
        return output

    values = evaluate(probed, student, teacher, mask, **{k: _cast(v, dtype) for k, v in options.items()})
    slopes = probe["tau"].grad if probe["tau"].requires_grad else None
    return values | {
        "scores": probe["scores"],
        "lost": probe["lost"],
        "slopes": 0.0 if slopes is None else slopes.abs().sum().item(),
    }


# ---- The tolerance rule -------------------------------------------------------------------------------


def assert_as_exact(backend, student, teacher, mask=None, decided=False, of_rows=False, **options) -> dict[str, Tensor]:
    """Assert that a backend's outputs and gradients are as exact as plain PyTorch in the compute dtype.

    error <= 2 * error(plain PyTorch, in the compute dtype, on the same inputs)
             + 16 (1 + largest score) roundings in the compute dtype, of the largest value: sums in another order,
               and a softmax passes on the absolute error of its scores; in float64, where the truth is rounded
               too and plain PyTorch's error is not known, as many more as a sum has terms, and for what comes of e as
               many times more as its terms are larger than e
             + one unit in the last place of the dtype that the value is stored in.

    decided: the softmax is 0 or 1, and passes no error of its scores on. of_rows: teacher gradients are sums over the
    rows, and their error grows as these are larger than e.
    """
    compute = torch.promote_types(torch.promote_types(student[0].dtype, teacher[0].dtype), torch.float32)
    got = evaluate(backend.details, student, teacher, mask, **options)
    want = in_dtype(torch.float64, student, teacher, mask, **options)
    eager = in_dtype(compute, student, teacher, mask, **options)
    scores, slopes, lost = want.pop("scores"), want.pop("slopes"), want.pop("lost")  # slopes: terms of d_scale
    roundings = 16 + (student[0].shape[-1] + student[0][..., 0].numel() if compute == torch.float64 else 0)
    floor = roundings * (1 if decided else 1 + scores) * backend.unit(student[0].dtype, teacher[0].dtype)
    assert floor < 0.5, f"the inputs' scores, up to {scores:.3g}, allow an error of {floor:.3g} times the values"
    assert got.keys() == want.keys()
    for name, exact in want.items():
        size = slopes if name == "d_scale" else exact.abs().max().item() if exact.numel() else 0.0
        of_e = compute == torch.float64 and name not in ("attention", "entropy")
        of_e |= of_rows and name == "d_teacher"
        assert_within(name, got[name], exact, eager[name], floor * size * (max(1.0, lost) if of_e else 1.0))
    return got


def assert_within(name: str, got: Tensor, exact: Tensor, eager: Tensor, floor: float) -> None:
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    assert bool(torch.isfinite(got).all()), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    stored = torch.finfo(got.dtype)
    # fp16 gradients are stored without 1/N first: the smallest step counts in both stores.
    step = 2 * stored.smallest_normal * stored.eps * (1 + exact.abs().max().item())
    eager_error = (eager.double() - exact).abs().max().item()
    error = (got.double() - exact).abs()
    budget = 2 * eager_error + floor + step + stored.eps * exact.abs()
    excess = error - budget
    worst = int(excess.argmax())
    assert bool((excess <= 0).all()), (
        f"{name}: error {error.flatten()[worst]:.3e} at {worst} of {got.numel()}, budget "
        f"{budget.flatten()[worst]:.3e}, plain PyTorch's error {eager_error:.3e}, value {exact.flatten()[worst]:.3e}"
    )
