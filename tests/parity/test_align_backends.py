"""Every back-end of the Align operator against a float64 oracle: outputs and all gradients.

Errors are relative to the largest value of the oracle's tensor; measured worst cases stand beside the tolerances.
"""

import pytest
import torch

from alignvlm_pl.ops import align
from alignvlm_pl.ops.chunked import align_chunked
from alignvlm_pl.ops.reference import align_reference

EPS = 1e-5
NAMES = ("hidden", "head", "gain", "bias", "table")
SHAPES = ((1, 64, 101), (5, 64, 1009), (37, 256, 503), (6561, 64, 131), (3, 2048, 4099), (4, 64, 1))


def chunked(*operands, **options):
    """Three tokens a chunk, so that all shapes have several and an uneven last one."""
    size = 2 * 3 * len(operands[1]) * operands[0].element_size()
    if len(operands[0]) > 100:
        size *= 400
    return align_chunked(*operands, budget=size, **options)


BACKENDS = {"eager": align_reference, "chunked": chunked}


def oracle(hidden, head, gain, bias, table, columns):
    scores = hidden @ head.T
    centred = scores - scores.mean(-1, keepdim=True)
    logits = gain * centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() + bias
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = powers / powers.sum(-1, keepdim=True)
    log_probs = logits - logits.amax(-1, keepdim=True) - powers.sum(-1, keepdim=True).log()
    return weights @ table, log_probs[:, columns]


def operands_of(shape, dtype, *, gain_scale=1.0, tied=False):
    tokens, width, rows = shape
    hidden = torch.randn(tokens, width)
    head = torch.randn(rows, width) / width**0.5
    gain = gain_scale * (1 + torch.randn(rows))
    gain[:: max(1, rows // 7)] = 0  # zeros and negatives
    table = torch.randn(rows, width)
    found = [tensor.to(dtype) for tensor in (hidden, head, gain, torch.randn(rows), table)]
    if tied:
        found[4] = found[1]
    return found


def results(call, operands, upstream, columns, *, frozen_table=False, tied=False):
    """Outputs and gradients of one scalar that both outputs enter."""
    leaves = [tensor.clone().requires_grad_() for tensor in operands]
    if tied:
        leaves[4] = leaves[1]
    if frozen_table:
        leaves[4].requires_grad_(False)
    embeds, log_probs = call(*leaves, columns)
    own, of_logs = (tensor.to(embeds.dtype) for tensor in upstream)
    (embeds * own).sum().add((log_probs * of_logs).sum()).backward()
    found = {"embeds": embeds.detach(), "log_probs": log_probs.detach()}
    found |= {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf.requires_grad}
    return found


def worst_error(found, expected):
    assert found.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        assert bool(found[name].isfinite().all()), name
        scale = max(float(value.abs().max()), 1e-3)
        errors[name] = float((found[name].double() - value).abs().max()) / scale
    return errors


def compare(backend, shape, dtype, **options):
    torch.manual_seed(5)
    kinds = {key: options.pop(key) for key in ("frozen_table",) if key in options}
    operands = operands_of(shape, dtype, **options)
    kinds["tied"] = options.get("tied", False)
    columns = torch.randint(0, shape[2], (min(shape[2], 9),))
    upstream = torch.randn(shape[0], shape[1]), torch.randn(shape[0], len(columns))

    def call(*leaves):
        return BACKENDS[backend](*leaves[:5], eps=EPS, columns=leaves[5])

    found = results(call, operands, upstream, columns, **kinds)
    exact = [tensor.double() for tensor in operands]
    expected = results(oracle, exact, [t.to(dtype).double() for t in upstream], columns, **kinds)
    return worst_error(found, expected)


# Measured worst cases: float64 3.5e-15; float32 2.4e-6; bfloat16 chunked 0.014, eager 0.027, and 0.104 for the gain's
# gradient over 6,561 tokens, which eager sums up in bfloat16 inside torch's layer norm.
TOLERANCES = {torch.float64: 2e-14, torch.float32: 1e-5, torch.bfloat16: 0.04}


def tolerance_of(backend, shape, dtype):
    """The tolerance of a dtype; wider where eager sums thousands of bfloat16 numbers."""
    sums_in_half = backend == "eager" and dtype == torch.bfloat16 and shape[0] > 100
    return 0.2 if sums_in_half else TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_all_gradients(backend, shape, dtype):
    errors = compare(backend, shape, dtype)
    assert max(errors.values()) <= tolerance_of(backend, shape, dtype), errors


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [{"tied": True}, {"frozen_table": True}], ids=str)
def test_tied_weights_and_a_frozen_table(backend, kind, dtype):
    errors = compare(backend, (37, 64, 503), dtype, **kind)
    assert ("table" in errors) == ("tied" in kind)
    assert max(errors.values()) <= TOLERANCES[dtype], errors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend, dtype, tolerance):
    """Logits of +-1e4 and more, so that nearly all weights are 0 or 1. Measured: 4e-16 and 8e-7."""
    errors = compare(backend, (11, 64, 1009), dtype, gain_scale=1e4)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_in_bfloat16_stay_weights(backend):
    """Scores that are rounded to 8 bits and then scaled by 1e4 may choose another row, but a row they choose."""
    torch.manual_seed(5)
    operands = operands_of((11, 64, 1009), torch.bfloat16, gain_scale=1e4)
    operands[4] = torch.eye(1009, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in operands]
    weights = BACKENDS[backend](*leaves, eps=EPS).embeds
    assert bool((weights >= 0).all())
    # Measured: 0, for nearly all weights are 0 or 1.
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(11), rtol=0, atol=1e-2)
    weights.float().square().sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_from_zero(backend):
    """Scores whose mean is 1e4 times their deviation. Measured: 4e-3, of the scores' own rounding in float32."""
    torch.manual_seed(5)
    operands = operands_of((6, 64, 503), torch.float32)
    operands[1] = operands[1] * 1e-3 + 1.0
    operands[0] = operands[0].abs()
    columns = torch.tensor([0, 7])
    found = BACKENDS[backend](*operands, eps=EPS, columns=columns)
    expected = oracle(*(tensor.double() for tensor in operands), columns)
    errors = worst_error(
        {"embeds": found.embeds, "log_probs": found.log_probs},
        {"embeds": expected[0], "log_probs": expected[1]},
    )
    assert max(errors.values()) <= 1e-2, errors


@pytest.mark.parametrize("gradients", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 2, 3), (0, 1, 2, 3)])
def test_only_the_gradients_that_are_wanted(gradients):
    operands = operands_of((7, 16, 37), torch.float64)
    grads = []
    for call in (align_reference, chunked):
        leaves = [t.clone().requires_grad_(place in gradients) for place, t in enumerate(operands)]
        call(*leaves, eps=EPS).embeds.square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [place in gradients for place in range(5)]
        grads.append([leaves[place].grad for place in gradients])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("table", [True, False])
def test_gradcheck(table):
    operands = [tensor.requires_grad_() for tensor in operands_of((5, 4, 11), torch.float64)]
    columns = torch.tensor([3, 10, 3])  # a column may be asked for twice

    def call(*leaves):
        mixture = chunked(*leaves[:4], leaves[4] if table else None, eps=EPS, columns=columns)
        return tuple(value for value in mixture if value is not None)

    assert torch.autograd.gradcheck(call, operands if table else operands[:4])


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_log_probabilities_without_a_table_have_the_same_gradients(backend):
    operands = operands_of((7, 16, 37), torch.float64)
    columns, grads = torch.tensor([1, 30]), []
    for table in (operands[4], None):
        leaves = [tensor.clone().requires_grad_() for tensor in operands[:4]]
        align(*leaves, table, columns=columns, backend=backend).log_probs.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    leaves = [tensor.requires_grad_() for tensor in operands_of((0, 8, 11), torch.float32)]
    mixture = BACKENDS[backend](*leaves, eps=EPS, columns=torch.tensor([2, 3]))
    assert mixture.embeds.shape == (0, 8)
    assert mixture.log_probs.shape == (0, 2)
    (mixture.embeds.sum() + mixture.log_probs.sum()).backward()
    for leaf in leaves:
        assert float(leaf.grad.abs().sum()) == 0
