"""What overcomplete 0.3.0 does wrong, shown on its own classes, and that the mended ones do not."""

from __future__ import annotations

import builtins
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import InputError
from lensbridge.methods.concepts.engine import engine

D, C = 16, 48
CODERS = ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "MpSAE", "OMPSAE", "QSAE")


@pytest.fixture(scope="module")
def upstream() -> Any:
    """Overcomplete, untouched."""
    import overcomplete.sae

    return overcomplete.sae


@pytest.fixture(scope="module")
def ours() -> Any:
    """Overcomplete, mended."""
    return engine()


@pytest.fixture
def rows() -> Tensor:
    """Rows of a Gaussian."""
    return torch.randn(64, D, generator=torch.Generator().manual_seed(0))


# --- (a) thresholds -----------------------------------------------------------------------------------------

KERNELS = (
    "rectangle",
    "gaussian",
    "triangular",
    "cosine",
    "epanechnikov",
    "quartic",
    "silverman",
    "cauchy",
)


def _share_of_truth(jump: Any, kernel: Any, bandwidth: float) -> float:
    """The pseudo-gradient of E[JumpReLU(x)] by its threshold, over the analytic -threshold * density."""
    # A fine grid in place of a sample: each point weighs what the density says.
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)[:, None]
    weight = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1, 0] - x[0, 0])
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    value = (jump(x, threshold, kernel, torch.tensor(bandwidth)) * weight).sum()
    (found,) = torch.autograd.grad(value, threshold)
    density = math.exp(-(0.7**2) / 2) / math.sqrt(2 * math.pi)
    return float(found) / (-0.7 * density)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bandwidth", [0.01, 0.05])
def test_a_thresholds_gradient_is_the_density(ours: Any, name: str, bandwidth: float) -> None:
    """For every kernel of overcomplete's, the mean pseudo-gradient is the derivative of the mean."""
    from lensbridge.methods.concepts.jump import jump_relu

    assert abs(_share_of_truth(jump_relu, ours.JumpSAE.kernels[name], bandwidth) - 1) < 0.02


@pytest.mark.parametrize(("name", "factor"), [("rectangle", 1.0), ("silverman", 2.0)])
def test_upstream_multiplies_it_by_the_bandwidth(upstream: Any, name: str, factor: float) -> None:
    """Overcomplete divides by the bandwidth once more."""
    from overcomplete.sae.jump_sae import jump_relu

    kernel = upstream.JumpSAE._KERNELS[name]
    assert _share_of_truth(jump_relu, kernel, 0.05) == pytest.approx(factor / 0.05, rel=0.02)


def test_the_step_has_the_densitys_gradient(ours: Any) -> None:
    """The number of codes changes with a threshold as minus the density there; inputs get no gradient."""
    from lensbridge.methods.concepts.jump import heaviside

    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    weight = torch.exp(-x.detach().square() / 2) / math.sqrt(2 * math.pi) * (16 / 400_000)
    threshold = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    kernel = ours.JumpSAE.kernels["rectangle"]
    value = (heaviside(x, threshold, kernel, torch.tensor(0.05)) * weight).sum()
    by_x, by_threshold = torch.autograd.grad(value, (x, threshold), allow_unused=True)
    assert by_x is None
    assert float(by_threshold) == pytest.approx(
        -math.exp(-0.245) / math.sqrt(2 * math.pi), rel=1e-3
    )


def test_adam_moves_a_threshold_by_the_learning_rate(
    upstream: Any, ours: Any, rows: Tensor
) -> None:
    """Kept as a logarithm, a threshold of 0.05 goes a twentieth of the way."""

    def moved(model: Any, value: Any, run: Any) -> float:
        adam = torch.optim.Adam([model.thresholds], lr=0.01)
        before = value(model).clone()
        run(model).backward()
        adam.step()
        return float((value(model) - before).abs().max())

    plain = upstream.JumpSAE(D, C, bandwidth=1.0, kernel="rectangle").train()
    mended = ours.JumpSAE(D, C, bandwidth=1.0, threshold=0.05)
    by_upstream = moved(
        plain, lambda m: m.thresholds.detach().exp(), lambda m: m(rows)[1].square().sum()
    )
    by_ours = moved(mended, lambda m: m.thresholds.detach(), lambda m: m(rows)[1].square().sum())
    assert by_upstream < 0.001
    assert by_ours == pytest.approx(0.01, rel=1e-3)


def test_a_threshold_stays_at_or_above_zero(ours: Any) -> None:
    """After a step that went below it."""
    model = ours.JumpSAE(D, C)
    with torch.no_grad():
        model.thresholds.sub_(1.0)
    model.after_step()
    assert float(model.thresholds.detach().min()) == 0


# --- (b) BatchTopK ------------------------------------------------------------------------------------------


def test_batch_top_k_counts_for_each_row(upstream: Any, ours: Any, rows: Tensor) -> None:
    """Upstream keeps top_k codes of the whole batch: a sixteenth of one a row."""
    torch.manual_seed(0)
    by_upstream = upstream.BatchTopKSAE(D, C, top_k=4).train()(rows)[1]
    by_ours = ours.BatchTopKSAE(D, C, top_k=4).train()(rows)[1]
    assert int((by_upstream > 0).sum()) == 4
    assert int((by_ours > 0).sum()) == 4 * len(rows)


def test_the_threshold_is_part_of_the_state(upstream: Any, ours: Any, rows: Tensor) -> None:
    """Upstream forgets it with the object, and cannot encode after loading."""
    first, second = (upstream.BatchTopKSAE(D, C, top_k=40).train() for _ in range(2))
    first(rows)
    second.load_state_dict(first.state_dict())
    second.eval()
    with pytest.raises(AssertionError, match="Running threshold"):
        second.encode(rows)
    first, second = (ours.BatchTopKSAE(D, C, top_k=4).train() for _ in range(2))
    first(rows)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.eval().encode(rows)[1], first.eval().encode(rows)[1])
    assert float(first.threshold) > 0


def test_a_batch_may_be_smaller_than_k(upstream: Any, ours: Any, rows: Tensor) -> None:
    """The last batch of an epoch mostly is."""
    with pytest.raises(RuntimeError):
        upstream.BatchTopKSAE(D, C, top_k=8 * len(rows)).train()(rows[:1])
    codes = ours.BatchTopKSAE(D, C, top_k=C).train()(rows[:1])[1]
    assert bool((codes >= 0).all())


def test_the_threshold_keeps_k_codes_a_row(ours: Any) -> None:
    """Also where most pre-codes were left out of the sorting."""
    x = torch.randn(2048, D, generator=torch.Generator().manual_seed(1))
    model = ours.BatchTopKSAE(D, C, top_k=5).train()
    for part in x.split(256):
        kept = model(part)[1]
        assert int((kept > 0).sum()) == 5 * len(part)
    l0 = float((model.eval().encode(x)[1] > 0).sum(1).float().mean())
    assert l0 == pytest.approx(5, rel=0.05)


# --- (c) the dictionary -------------------------------------------------------------------------------------


def test_reading_a_dictionary_writes_nothing(upstream: Any, ours: Any) -> None:
    """Upstream's decode makes the weights it reads into others."""
    codes = torch.ones(1, C)
    for model, is_kept in ((upstream.SAE(D, C).train(), False), (ours.SAE(D, C).train(), True)):
        with torch.no_grad():
            model.dictionary._weights.mul_(3.0)
        before = model.dictionary._weights.detach().clone()
        model.decode(codes)
        model.get_dictionary()
        assert torch.equal(model.dictionary._weights, before) is is_kept


@pytest.mark.parametrize("name", ["SAE", "TopKSAE", "JumpSAE", "MpSAE"])
def test_a_loaded_dictionary_is_used(upstream: Any, ours: Any, name: str) -> None:
    """Upstream goes on with the one it had when it was first evaluated, and cannot be copied then."""
    for source, is_used in ((upstream, False), (ours, True)):
        first, second = (getattr(source, name)(D, C).train() for _ in range(2))
        with torch.no_grad():
            second.dictionary._weights.neg_()
        second.get_dictionary()
        first.eval()
        first.load_state_dict(second.state_dict())
        new = second.dictionary._weights.detach()
        assert torch.equal(first.get_dictionary().detach(), new) is is_used
        if is_used:
            assert torch.equal(copy.deepcopy(first).get_dictionary(), new)
        else:
            with pytest.raises(RuntimeError, match="deepcopy"):
                copy.deepcopy(first)


@pytest.mark.parametrize("name", CODERS)
def test_moving_moves_everything(ours: Any, name: str) -> None:
    """Onto "meta", the one other device there is everywhere: no tensor is left behind, as upstream leaves some."""
    model = getattr(ours, name)(D, C).eval().to("meta")
    assert model.device.type == model.dictionary.get_dictionary().device.type == "meta"
    left = [key for key, x in vars(model).items() if isinstance(x, Tensor)]
    assert not left


def test_upstream_leaves_tensors_behind(upstream: Any) -> None:
    """The bandwidth, the dictionary of its evaluation, and the name of the device."""
    model = upstream.JumpSAE(D, C).eval().to("meta")
    assert model.bandwidth.device.type == "cpu"
    assert model.get_dictionary().device.type == "cpu"
    assert model.device == "cpu"


def test_lengths_of_atoms_get_no_gradient(ours: Any, rows: Tensor) -> None:
    """What would only make an atom longer is undone after the step, and would fill Adam's moments."""
    model = ours.TopKSAE(D, C)
    model.dense(rows)[2].square().sum().backward()
    model.before_step()
    weights = model.dictionary._weights
    along = (weights.grad * weights.detach()).sum(1)
    assert float(along.abs().max()) < 1e-4 * float(weights.grad.norm())


# --- (d) defaults -------------------------------------------------------------------------------------------


def test_default_numbers_of_codes(upstream: Any, ours: Any) -> None:
    """Upstream's are a tenth of the concepts for a whole batch, one atom, or hundreds a row."""
    assert upstream.BatchTopKSAE(D, 512).top_k == 51
    assert upstream.MpSAE(D, 512).k == 1
    assert upstream.TopKSAE(D, 8192).top_k == 819
    assert (
        ours.BatchTopKSAE(D, 512).top_k == ours.MpSAE(D, 512).k == ours.TopKSAE(D, 8192).top_k == 32
    )
    assert ours.TopKSAE(D, 64).top_k == 8
    assert ours.TopKSAE(D, 2).top_k == 1


# --- (g, h) what is left over -------------------------------------------------------------------------------


def test_matching_pursuit_has_no_idle_parameters(upstream: Any, ours: Any, rows: Tensor) -> None:
    """Given the linear encoder, as interpreto does, upstream carries weights that nothing uses."""
    plain = upstream.MpSAE(D, C, encoder_module="linear").train()
    plain(rows)[2].square().sum().backward()
    assert any(p.grad is None for p in plain.parameters())
    mended = ours.MpSAE(D, C)
    mended(rows)[2].square().sum().backward()
    assert all(p.grad is not None for p in mended.parameters())
    with pytest.raises(InputError, match="encoder_module"):
        ours.MpSAE(D, C, encoder_module="linear")


@pytest.mark.parametrize("name", ["MpSAE", "OMPSAE"])
def test_dropout_survives_an_evaluation(upstream: Any, ours: Any, name: str) -> None:
    """Upstream's is gone for good."""
    for source, rate in ((upstream, None), (ours, 0.5)):
        model = getattr(source, name)(D, C, dropout=0.5).train()
        model.eval()
        assert model.train().dropout == rate


def test_matching_pursuit_is_upstreams(upstream: Any, ours: Any, rows: Tensor) -> None:
    """The same atoms and amounts, and the same gradients, though products are updated and atoms gathered."""
    torch.manual_seed(3)
    plain = upstream.MpSAE(D, C, k=6).train()
    mended = ours.MpSAE(D, C, k=6, bias=False).train()
    plain.get_dictionary()
    with torch.no_grad():
        mended.dictionary._weights.copy_(plain.dictionary._weights)
    left, codes, x_hat = plain(rows)
    found = mended.training_pass(rows)
    torch.testing.assert_close(mended.encode(rows)[1], codes)
    torch.testing.assert_close(found.x_hat, x_hat)
    torch.testing.assert_close(rows - found.x_hat, left)
    grads = [
        torch.autograd.grad((made - rows).square().mean(), model.dictionary._weights)[0]
        for made, model in ((x_hat, plain), (found.x_hat, mended))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["SAE", "TopKSAE"])
def test_without_a_bias_it_is_upstreams(upstream: Any, ours: Any, rows: Tensor, name: str) -> None:
    """The same weights give the same codes and reconstructions."""
    kwargs = {} if name == "SAE" else {"top_k": 5}
    plain = getattr(upstream, name)(D, C, **kwargs).train()
    plain.get_dictionary()
    mended = getattr(ours, name)(D, C, bias=False, **kwargs)
    mended.load_state_dict(plain.state_dict(), strict=False)
    for made, wanted in zip(mended(rows), plain(rows), strict=True):
        torch.testing.assert_close(made, wanted)


# --- few codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SAE", {}),
        ("TopKSAE", {"top_k": 3}),
        ("BatchTopKSAE", {"top_k": 3}),
        ("JumpSAE", {"threshold": 1.2, "target_l0": 3}),
    ],
)
def test_few_codes_give_the_gradients_of_all(
    ours: Any, rows: Tensor, name: str, kwargs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over the codes that matter against plain dense products, with the penalty, at a trained-like offset."""
    from lensbridge.methods.concepts import models

    model = getattr(ours, name)(D, C, **kwargs).double().train()
    u = rows.double()
    with torch.no_grad():
        model.b_dec.copy_(u.mean(0))
        model.linear.bias.normal_(-0.3, 0.1)

    def gradients() -> tuple[Any, list[Tensor]]:
        found = model.training_pass(u)
        loss = (found.x_hat - u).square().mean()
        if found.penalty is not None:
            loss = loss + found.penalty
        return found, list(
            torch.autograd.grad(loss, list(model.parameters())[:-1], allow_unused=True)
        )

    monkeypatch.setattr(models, "_SPARSE", 1.0)
    few, by_few = gradients()
    pre = model.encoder(u - model.b_dec)[0]
    codes = model._activated(pre, None)
    if name == "TopKSAE":
        codes = model.inside(u - model.b_dec)[1]
    x_hat = codes @ model.get_dictionary() + model.b_dec
    loss = (x_hat.float() - u).square().mean()
    penalty = model._penalty(codes, pre, None, len(u))
    if penalty is not None:
        loss = loss + penalty
    by_all = torch.autograd.grad(loss, list(model.parameters())[:-1], allow_unused=True)
    assert float(few.l0) == int((codes > 0).sum())
    assert torch.equal(few.fired, (codes > 0).any(0))
    for made, wanted in zip(by_few, by_all, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-7)


# --- scale and offset ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
def test_codes_times_atoms_are_the_reconstruction(ours: Any, rows: Tensor, name: str) -> None:
    """In the units of the activations, before and after the scale is folded in."""
    x = 7 + 3 * rows
    model = getattr(ours, name)(D, C).eval()
    model.begin(x.mean(0), torch.tensor(1 / 3))
    with torch.no_grad():
        before = model(x)
        model.fold()
        after = model(x)
        codes, x_hat = after[1], after[2]
    torch.testing.assert_close(codes @ model.get_dictionary() + model.offset, x_hat)
    for made, wanted in zip(after[1:], before[1:], strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    norms = model.get_dictionary().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(C))


# --- a missing engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [ImportError("no such module"), AttributeError("get_cmap")])
def test_a_missing_overcomplete_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """Not there, or unimportable, as with matplotlib 3.9."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("overcomplete"):
            raise fault
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError) as caught:
        engine.__wrapped__()
    said = str(caught.value)
    for part in (
        "lensbridge[sae]",
        "overcomplete==0.3.0",
        "matplotlib<3.9",
        "python<3.13",
        str(fault),
    ):
        assert part in said


def test_importing_the_explainers_does_not_import_overcomplete() -> None:
    """It takes ten seconds, and may be missing."""
    import subprocess
    import sys

    code = "import lensbridge.methods.concepts.explainers, sys; sys.exit('overcomplete' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_callers_encoder_is_used(ours: Any, rows: Tensor) -> None:
    """A module that gives pre-codes and codes."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, C)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            pre = self.layer(2 * x)
            return pre, pre.relu()

    module = Twice()
    model = ours.TopKSAE(D, C, encoder_module=module, top_k=3)
    codes = model.encode(rows)[1]
    assert torch.equal(codes.max(1).values, module(rows)[1].max(1).values)
    assert not model.is_linear
