"""The Align operator: choice of back-end, properties, autocast, compiler, checkpointing, memory."""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models.align import AlignConnector
from alignvlm_pl.ops import (
    BACKENDS,
    AlignOutput,
    align,
    choose_backend,
    chunked,
    norm_softmax,
    triton_probe,
    vocabulary_mass,
)
from alignvlm_pl.ops.chunked import align_chunked
from alignvlm_pl.ops.reference import align_reference
from tests.drills.launch import run_program

ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-5


def operands(tokens=9, width=16, rows=101, dtype=torch.float32):
    shapes = ((tokens, width), (rows, width), (rows,), (rows,), (rows, width))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def gradients(call, tensors):
    """Output of a call of five tensors, and gradients of the sum of its squares."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = call(*leaves)
    output.float().square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_all_close(found, expected, tolerance):
    """Each tensor within a share of the expected one's largest value."""
    for one, other in zip(found, expected, strict=True):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL, LARGE = 4096 * 1024, 729 * 128256


@pytest.mark.parametrize(
    ("name", "device", "scores", "chosen"),
    [
        ("auto", CPU, SMALL, "eager"),
        ("auto", CUDA, SMALL, "eager"),
        ("auto", CPU, LARGE, "chunked"),
        ("auto", CUDA, LARGE, "triton"),
        ("chunked", CPU, SMALL, "chunked"),
        ("eager", CUDA, LARGE, "eager"),
        ("triton", CUDA, SMALL, "triton"),
    ],
)
def test_choice(monkeypatch, name, device, scores, chosen):
    for probe, found in (("triton_runs", True), ("why_not_triton", None)):  # as if its kernels had run here
        monkeypatch.setattr(f"alignvlm_pl.ops.operator.{probe}", lambda kind, index, found=found: found)
    assert choose_backend(name, device=device, scores=scores) == chosen


def embeds(*leaves, **options):
    return align(*leaves, **options).embeds


@pytest.fixture
def _probed_anew():
    for cached in (triton_probe._probe, triton_probe._warn):
        cached.cache_clear()
    yield
    for cached in (triton_probe._probe, triton_probe._warn):
        cached.cache_clear()


def assert_falls_back(because):
    """`auto` takes chunked with one warning, and `triton` is refused, both with the reason."""
    with pytest.warns(UserWarning, match=rf"auto takes 'chunked', not 'triton': .*{because}") as warned:
        assert [choose_backend("auto", device=CUDA, scores=LARGE) for _ in range(3)] == ["chunked"] * 3
    assert len(warned) == 1
    with pytest.raises(ConfigError, match=rf"'triton': .*{because}.*; or set backend: chunked or auto"):
        choose_backend("triton", device=CUDA, scores=LARGE)


@pytest.mark.usefixtures("_probed_anew")
def test_choice_without_triton(monkeypatch):
    monkeypatch.setattr("alignvlm_pl.ops.triton_probe.find_spec", lambda name: None)
    assert_falls_back("the package triton is not installed")


@pytest.mark.usefixtures("_probed_anew")
@pytest.mark.parametrize(
    ("variables", "include", "because"),
    [
        ({"PATH": "", "CC": ""}, None, "no C compiler: gcc or clang is not on PATH; install one, or set CC .Runtime"),
        ({"CC": "absent-cc"}, None, "no C compiler: absent-cc is not on PATH"),
        ({"CC": sys.executable}, "absent", "Python.h is missing: install Python's headers"),
        ({"CC": sys.executable}, "there", "its kernels do not compile .RuntimeError: Failed to find C compiler"),
    ],
)
def test_what_triton_lacks_is_named(monkeypatch, tmp_path, variables, include, because):
    def fail(device):
        raise RuntimeError("Failed to find C compiler.\nmore lines")

    monkeypatch.setattr(triton_probe, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_probe, "_compare", fail)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if include:
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "Python.h").touch()
        monkeypatch.setattr(triton_probe.sysconfig, "get_paths", lambda: {"include": str(tmp_path / include)})
    assert_falls_back(because)


@pytest.mark.usefixtures("_probed_anew")
@pytest.mark.parametrize("right", [True, False])
def test_the_probe_compares_both_kernels_with_plain_torch(monkeypatch, right):
    def backward(scores, weights, norm, total, columns, logs):
        norm_softmax.norm_softmax_backward_(scores, weights, norm, total, columns, logs)
        if not right:
            total.gain[3] += 0.01

    kernels = SimpleNamespace(norm_softmax_=norm_softmax.norm_softmax_, norm_softmax_backward_=backward)
    monkeypatch.setattr(triton_probe, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "alignvlm_pl.ops.norm_softmax_triton", kernels)
    monkeypatch.setattr("alignvlm_pl.ops.norm_softmax_triton", kernels, raising=False)
    found = triton_probe.why_not_triton("cpu", None)
    assert found is None if right else "other numbers than plain torch on cpu (difference 1.0e-02)" in found


def test_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = operands()
    with pytest.raises(ConfigError, match=r"'tritn' is unknown; did you mean 'triton'.*auto, chunked, eager, triton"):
        align(*tensors, backend="tritn")
    with pytest.raises(ConfigError, match="backend 'chunk' is unknown"):
        AlignConnector(5, 6, 11, backend="chunk")
    with pytest.raises(ConfigError, match="needs a CUDA device, the tensors are on 'cpu'; set backend: chunked"):
        align(*tensors, backend="triton")
    with pytest.raises(ConfigError, match="width 16, W2 has 15"):
        align(tensors[0], tensors[1][:, :15], *tensors[2:])
    with pytest.raises(ConfigError, match="W2 has 101, the vocabulary norm has 101, the embedding table has 99"):
        align(*tensors[:4], tensors[4][:99])


def test_the_connector_uses_the_back_end_of_its_options(monkeypatch):
    called = []

    def spy(*tensors, **options):
        called.append(options)
        return align_reference(*tensors, **options)

    monkeypatch.setitem(BACKENDS, "chunked", spy)
    features, table = torch.randn(2, 3, 5), torch.randn(11, 6)
    connector = AlignConnector(5, 6, 11, backend="chunked")
    connector(features, table)
    connector(features, table, columns=torch.tensor([1]))
    connector.log_probs(features, torch.tensor([1]))
    assert len(called) == 3
    AlignConnector(5, 6, 11)(features, table)
    assert len(called) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_connector_results_do_not_depend_on_the_back_end(dtype):
    features, table = torch.randn(2, 3, 5, dtype=dtype), torch.randn(101, 6, dtype=dtype)
    results = []
    for backend in ("eager", "chunked"):
        torch.manual_seed(1)
        connector = AlignConnector(5, 6, 101, gain_init=3.0, backend=backend).to(dtype)
        leaf = table.clone().requires_grad_()
        output = connector(features, leaf, columns=torch.tensor([3, 100]))
        (output.embeds.square().sum() + output.log_probs.square().sum()).backward()
        assert output.embeds.shape == (2, 3, 6)
        assert output.log_probs.shape == (2, 3, 2)
        results.append([*output, leaf.grad, *(p.grad for p in connector.parameters())])
    # Measured: 3e-15, 1e-6; 0.03 (eager rounds the scores to bfloat16 once more).
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert_all_close(results[1], results[0], tolerance)


@pytest.mark.parametrize("mix", [align_reference, align_chunked], ids=["eager", "chunked"])
def test_outputs_lie_in_the_hull(mix):
    hidden, head, gain, bias, table = operands()
    weights = mix(hidden, head, 5 * gain, bias, torch.eye(101), eps=EPS).embeds
    assert float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))
    embeds = mix(hidden, head, 5 * gain, bias, table, eps=EPS).embeds
    assert bool((embeds <= table.amax(0) + 1e-6).all() and (embeds >= table.amin(0) - 1e-6).all())
    mass = vocabulary_mass(hidden, head, 5 * gain, bias, eps=EPS)
    torch.testing.assert_close(mass, weights.double().sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mix", [align_reference, align_chunked], ids=["eager", "chunked"])
def test_the_order_of_the_vocabulary_does_not_matter(mix):
    hidden, *others = operands(dtype=torch.float64)
    order = torch.randperm(101)
    found = mix(hidden, *(tensor[order] for tensor in others), eps=EPS).embeds
    torch.testing.assert_close(found, mix(hidden, *others, eps=EPS).embeds, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_size_of_chunks_changes_nothing_beyond_rounding(dtype):
    tensors = operands(tokens=23, dtype=dtype)

    def call(tokens, *leaves):
        budget = tokens * 2 * 101 * dtype.itemsize
        return align_chunked(*leaves, eps=EPS, budget=budget).embeds

    whole = gradients(partial(call, 1000), tensors)
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]
    for tokens in (1, 5, 22, 23):
        assert_all_close(gradients(partial(call, tokens), tensors), whole, tolerance)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(own, monkeypatch):
    """Products in bfloat16, gradients in the weights' dtype; a product is added to its gradient in slices."""
    monkeypatch.setattr("alignvlm_pl.ops.chunked._SLICE_BYTES", 16 * 4 * 30)  # four slices
    tensors = operands(dtype=own)
    exact = gradients(partial(embeds, backend="eager"), [tensor.double() for tensor in tensors])

    def call(*leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return align_chunked(*leaves, eps=EPS, budget=4 * 2 * 101 * 2).embeds

    found = gradients(call, tensors)
    assert found[0].dtype == torch.bfloat16
    assert {gradient.dtype for gradient in found[1:]} == {own}
    assert_all_close([tensor.double() for tensor in found], exact, 0.06)  # measured 0.02


class Traffic(TorchDispatchMode):
    """Elements cast from float32 to bfloat16, and elements that a gradient in float32 is written with."""

    def __init__(self):
        super().__init__()
        self.cast = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        casts = func in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
        if casts and (args[0].dtype, result.dtype) == (torch.float32, torch.bfloat16):
            self.cast += result.numel()
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.add_.Tensor) and args[0].dtype == torch.float32:
            self.written += args[0].numel()
        return result


def test_float32_weights_are_cast_once_a_call(monkeypatch):
    """Six chunks: W2 and E_text are cast in forward and in backward, and each gradient is written once a chunk."""
    traffic = Traffic()

    def counted(call):
        def run(*arguments):
            with traffic:
                return call(*arguments)

        return run

    for name in ("_forward", "_backward"):  # the modes outside of a custom operator do not see into it
        monkeypatch.setattr(chunked, name, counted(getattr(chunked, name)))
    tokens, width, rows = 18, 64, 1001
    leaves = [tensor.requires_grad_() for tensor in operands(tokens, width, rows)]
    with torch.autocast("cpu", torch.bfloat16):
        align_chunked(*leaves, eps=EPS, budget=3 * 2 * rows * 2).embeds.backward(torch.ones(tokens, width).bfloat16())
    weights = rows * width
    assert 4 * weights <= traffic.cast < 4.1 * weights
    assert 2 * 6 * weights <= traffic.written < 2.1 * 6 * weights


@pytest.mark.parametrize(
    ("tokens", "held", "chunk"), [(6561, 2616, 2304), (6561, 729, 640), (729, 800, 729), (300, 128, 128), (50, 20, 17)]
)
def test_chunks_fit_into_the_budget_and_are_whole_tiles(tokens, held, chunk):
    """`held` tokens fit into the budget; chunks are about equal, and multiples of 128 where that many fit."""
    rows = 11
    hidden, *weights = operands(tokens, 4, rows)
    inputs = chunked._Inputs(hidden, *weights, None, EPS, held * 2 * rows * 4)
    assert inputs.chunk_tokens == chunk <= held
    assert sum(part.stop - part.start for part in inputs.chunks()) == tokens


def test_default_budget(monkeypatch):
    for memory, budget in ((80 << 30, 5 << 29), (24 << 30, 3 << 28), (192 << 30, 3 << 30)):
        card = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert chunked.default_budget(CUDA) == budget
    assert chunked.default_budget(CPU) == 376 << 20


def test_the_connector_hands_on_its_budget(monkeypatch):
    budgets = []
    monkeypatch.setitem(
        BACKENDS,
        "chunked",
        lambda *tensors, budget=None, **options: budgets.append(budget) or align_reference(*tensors, **options),
    )
    for budget_gib in (None, 0.5):
        connector = AlignConnector(5, 6, 11, backend="chunked", budget_gib=budget_gib)
        connector(torch.randn(2, 3, 5), torch.randn(11, 6))
    assert budgets == [None, 1 << 29]
    AlignConnector(5, 6, 11, backend="eager", budget_gib=0.5)(torch.randn(2, 3, 5), torch.randn(11, 6))
    with pytest.raises(ConfigError, match="budget_gib=0"):
        AlignConnector(5, 6, 11, budget_gib=0)


def test_weights_of_another_dtype_without_autocast():
    tensors = operands()
    tensors[4] = tensors[4].bfloat16()
    found = embeds(*tensors, backend="chunked")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, embeds(*tensors, backend="eager"), rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_compiled_without_a_graph_break(backend):
    tensors = operands()
    columns = torch.tensor([1, 5])

    def call(*leaves):
        mixture = align(*leaves, columns=columns, backend=backend)
        return torch.cat([mixture.embeds * 2, mixture.log_probs], dim=1)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_all_close(gradients(compiled, tensors), gradients(call, tensors), 1e-6)


def test_activation_checkpointing():
    tensors = operands()
    call = partial(embeds, backend="chunked")
    expected = gradients(call, tensors)
    for reentrant in (False, True):
        found = gradients(lambda *leaves, r=reentrant: checkpoint(call, *leaves, use_reentrant=r), tensors)
        assert_all_close(found, expected, 1e-7)


def test_nothing_but_the_inputs_is_kept_for_backward():
    leaves = [tensor.requires_grad_() for tensor in operands()]
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        align(*leaves, backend="chunked")
    addresses = {leaf.data_ptr() for leaf in leaves}
    assert {tensor.data_ptr() for tensor in kept} <= addresses


def test_one_of_two_outputs_may_be_left_unused():
    tensors = operands(dtype=torch.float64)
    columns = torch.tensor([2])
    for place in (0, 1):
        found, expected = (
            gradients_of_one(lambda *leaves, m=mix: m(*leaves, eps=EPS, columns=columns), tensors, place)
            for mix in (align_chunked, align_reference)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def gradients_of_one(call, tensors, place):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output: AlignOutput = call(*leaves)
    output[place].square().sum().backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


MEMORY = """
import ctypes, json, sys
from pathlib import Path
import torch
from alignvlm_pl.ops.chunked import align_chunked
from alignvlm_pl.ops.reference import align_reference
torch.set_num_threads(1)
libc = ctypes.CDLL(None)
libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: freed arrays are given back at once
libc.mallopt(-6, 1)  # M_PERTURB: what is allocated counts, written or not

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))

def extra(mix, tokens):
    shapes = ((tokens, 64), (16001, 64), (16001,), (16001,), (16001, 64))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    upstream = torch.randn(tokens, 64)
    mix(leaves[0][:3], *leaves[1:]).backward(upstream[:3])
    for leaf in leaves:
        leaf.grad = None
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    mix(*leaves).backward(upstream)
    known = sum(leaf.nbytes for leaf in leaves) + upstream.nbytes
    return (status("VmHWM") - before - known) / 2**20

def chunked(*leaves):
    return align_chunked(*leaves, eps=1e-5, budget=48 << 20).embeds

def eager(*leaves):
    return align_reference(*leaves, eps=1e-5).embeds

print(json.dumps([extra(chunked, 729), extra(chunked, 6561), extra(eager, 729)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of memory from /proc")
def test_memory_does_not_grow_with_the_tokens(tmp_path):
    """Arrays of 48 MiB; scores of 729 tokens are 44 MiB and eager holds several, those of 6,561 are 400."""
    program = tmp_path / "memory.py"
    program.write_text(MEMORY)
    few, many, eager = json.loads(run_program(program))
    # Measured: 57, 60 and 174 MiB; an array (tokens, 64) of the large batch is 1.6, scores kept whole would add 700.
    assert few < 75
    assert many < few + 10, (few, many)
    assert eager > 1.5 * few, (few, eager)


TRITON = """
import torch
from alignvlm_pl.ops import align, norm_softmax_triton
norm_softmax_triton._ROWS_PER_GROUP = 4  # six rows are two groups, the second one not full
torch.manual_seed(0)
worst = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for tokens, width, rows, gain in ((1, 8, 13, 1.0), (6, 8, 37, 1.0), (3, 16, 4999, 1.0), (5, 8, 101, 1e4)):
        if gain > 1 and dtype == torch.bfloat16:
            continue
        shapes = ((tokens, width), (rows, width), (rows,), (rows,), (rows, width))
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        tensors[2] *= gain
        tensors[2][::3] = 0
        columns = torch.tensor([3, 0, 7, 3])
        upstream = torch.randn(tokens, width), torch.randn(tokens, 4), torch.randn(tokens, 4)
        found = []
        for backend, own in (("eager", torch.float64), ("triton", dtype)):
            leaves = [tensor.to(own).requires_grad_() for tensor in tensors]
            both = align(*leaves, columns=columns, backend=backend)
            alone = align(*leaves[:4], None, columns=columns, backend=backend)
            outputs = both.embeds, both.log_probs, alone.log_probs
            loss = sum((o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream))
            found.append([*outputs, *torch.autograd.grad(loss, leaves)])
        for exact, got in zip(*found):
            error = float((got.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max())
            assert error == error
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
import json
import os
print(json.dumps(worst))
"""


def interpreter_obstacle():
    """Why Triton's interpreter does not run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    triton, numpy = (tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy"))
    return (
        "Triton's interpreter before 3.7 fails with NumPy from 2.4 on" if triton < (3, 7) and numpy >= (2, 4) else None
    )


@pytest.mark.slow
@pytest.mark.skipif(interpreter_obstacle() is not None, reason=str(interpreter_obstacle()))
def test_triton_kernels_in_its_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    # Against eager in float64; measured 1.4e-15, 1.9e-6, 0.019.
    assert worst["torch.float64"] < 1e-14
    assert worst["torch.float32"] < 2e-5
    assert worst["torch.bfloat16"] < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_back_ends_on_a_gpu(backend, dtype):
    tensors = [tensor.cuda().to(dtype) for tensor in operands(tokens=300, width=256, rows=5003)]
    exact = gradients(partial(embeds, backend="eager"), [tensor.double() for tensor in tensors])
    found = gradients(partial(embeds, backend=backend), tensors)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert_all_close([tensor.double() for tensor in found], exact, tolerance)
