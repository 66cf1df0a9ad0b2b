"""SAE explainers on tensors: what fit gives and leaves, options, refusals, checkpoints, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    InputError,
    ModelWithSplitPoints,
    SplitterForGeneration,
    TransformerBridge,
    UnknownPointError,
)
from lensbridge.methods.concepts.explainers import (
    KINDS,
    DeadNeuronsReanimation,
    JumpReLUSAEConcepts,
    MpSAEConcepts,
    MSELoss,
    NotFittedError,
    RATopKSAEConcepts,
    SAEExplainer,
    SAELossClasses,
    TopKSAEConcepts,
    VanillaSAEConcepts,
)
from lensbridge.methods.concepts.figures import explained_variance
from lensbridge.methods.concepts.training import Trainer, TrainingOptions

POINT = "blocks.1.hook_out"
FIVE = ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "MpSAE")
QUICK: dict[str, Any] = {"nb_epochs": 2, "batch_size": 64, "lr": 3e-3}


@pytest.fixture(scope="module")
def splitter(tiny: Callable[..., nn.Module], tokenizer: Any) -> SplitterForGeneration:
    """A tiny GPT-2 behind its second layer."""
    return SplitterForGeneration(tiny("gpt2"), 1, tokenizer=tokenizer, batch_size=2)


@pytest.fixture(scope="module")
def d(splitter: SplitterForGeneration) -> int:
    """The width of its activations."""
    return splitter.get_latent_shape()[-1]


@pytest.fixture
def rows(d: int) -> Tensor:
    """Sparse sums of a few directions, away from zero."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.rand(300, 40, generator=draw) * (torch.rand(300, 40, generator=draw) < 0.1)
    return codes @ torch.randn(40, d, generator=draw) + 2


@pytest.fixture
def new(splitter: SplitterForGeneration, rows: Tensor) -> Callable[..., SAEExplainer]:
    """``new("TopKSAE")``: an explainer of that kind with 24 concepts."""

    def make(kind: str = "TopKSAE", **kwargs: Any) -> SAEExplainer:
        if kind.startswith("RA"):
            kwargs["points"] = rows[:50]
        return KINDS[kind](splitter, **{"nb_concepts": 24, **kwargs})

    return make


# --- what fit gives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_learns_encodes_and_decodes(new: Any, rows: Tensor, d: int, kind: str) -> None:
    """Shapes, the reconstruction as a formula, no graph, and a loss that falls."""
    explainer = new(kind)
    assert not explainer.is_fitted
    history = explainer.fit(rows, **{**QUICK, "nb_epochs": 4})
    assert set(history) == {"loss", "l0", "explained_variance", "dead"}
    assert all(len(values) == 4 for values in history.values())
    assert history["loss"][-1] < history["loss"][0]
    assert explainer.is_fitted
    codes = explainer.encode_activations(rows)
    x_hat = explainer.decode_concepts(codes)
    atoms = explainer.get_dictionary()
    assert codes.shape == (300, 24)
    assert atoms.shape == (24, d)
    assert not any(made.requires_grad for made in (codes, x_hat, atoms))
    assert float(codes.min()) >= 0
    torch.testing.assert_close(codes @ atoms + explainer.b_dec, x_hat)
    if not kind.startswith("RA"):
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(24))
    assert torch.equal(explainer.activations_to_concepts(rows), codes)
    assert torch.equal(explainer.concepts_to_activations(codes), x_hat)


@pytest.mark.parametrize("kind", FIVE)
def test_a_seed_decides(new: Any, rows: Tensor, kind: str) -> None:
    """The same figures and the same bits again; others with another seed; the caller's numbers go on."""
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = new(kind), new(kind), new(kind)
    told = first.fit(rows, **QUICK)
    torch.rand(100)
    assert second.fit(rows, **QUICK) == told
    assert other.fit(rows, seed=1, **QUICK) != told
    assert torch.equal(first.encode_activations(rows), second.encode_activations(rows))
    torch.manual_seed(5)
    new(kind).fit(rows, **QUICK)
    assert torch.equal(torch.rand(3), wanted)


def test_the_history_is_what_it_says(new: Any, rows: Tensor) -> None:
    """One epoch of one batch at a learning rate of zero: figures of the first weights, by hand."""
    explainer = new("TopKSAE", top_k=5)
    history = explainer.fit(rows, nb_epochs=1, batch_size=1000, lr=0.0)
    codes = explainer.encode_activations(rows)
    x_hat = explainer.decode_concepts(codes)
    error = (rows.double() - x_hat.double()).square().sum()
    spread = (rows.double() - rows.double().mean(0)).square().sum()
    assert history["explained_variance"][0] == pytest.approx(float(1 - error / spread), abs=1e-5)
    assert history["explained_variance"][0] == pytest.approx(
        explained_variance(rows, x_hat), abs=1e-5
    )
    assert history["l0"][0] == pytest.approx(float((codes > 0).sum(1).double().mean()))
    assert history["dead"][0] == pytest.approx(float((codes.sum(0) == 0).double().mean()))
    away = rows - rows.mean(0)
    scale = rows.shape[1] ** 0.5 / away.norm(dim=1).mean()
    assert history["loss"][0] == pytest.approx(float(error / rows.numel() * scale**2), rel=1e-4)
    torch.testing.assert_close(explainer.b_dec, rows.mean(0))


def test_without_a_bias(new: Any, rows: Tensor) -> None:
    """Nothing is taken off, added or scaled, as in the source."""
    explainer = new("TopKSAE", bias=False)
    explainer.fit(rows, **QUICK)
    assert not explainer.b_dec.any()
    assert float(explainer.concept_model.scale) == 1
    codes = explainer.encode_activations(rows)
    torch.testing.assert_close(explainer.decode_concepts(codes), codes @ explainer.get_dictionary())


def test_monitoring(new: Any, rows: Tensor) -> None:
    """Figures of each step, where they are asked for."""
    history = new().fit(rows, monitoring=2, **QUICK)
    assert len(history["step_loss"]) == len(history["lr"]) == 10
    assert set(history["lr"]) == {3e-3}
    assert len(history["params_grad_norm_b_dec"]) == 10


def test_a_bar_with_figures(new: Any, rows: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss, codes, variance and dead share, while it runs."""
    new().fit(rows, progress=True, **QUICK)
    said = capsys.readouterr().err
    for part in ("loss=", "l0=", "explained_variance=", "dead=", "10/10"):
        assert part in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_and_lists(new: Any, rows: Tensor, dtype: torch.dtype) -> None:
    """Rows of any precision, in one tensor or several."""
    given = rows.to(dtype)
    one, several = new(), new()
    assert one.fit(given, **QUICK) == several.fit([given[:7], given[7:]], **QUICK)
    assert torch.equal(one.encode_activations(given), several.encode_activations(given.float()))


def test_graphs_only_for_inputs_that_ask(new: Any, rows: Tensor) -> None:
    """The gradient goes to the input; no parameter keeps one."""
    explainer = new("JumpSAE")
    explainer.fit(rows, **QUICK)
    x = rows.clone().requires_grad_()
    explainer.decode_concepts(explainer.encode_activations(x)).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert all(p.grad is None for p in explainer.concept_model.parameters())


def test_first_atoms_of_the_callers(new: Any, rows: Tensor) -> None:
    """Made unit, and encoded with; a learning rate of zero keeps them."""
    atoms = rows[:24]
    explainer = new("TopKSAE", dictionary_params={"initializer": atoms})
    explainer.fit(rows, nb_epochs=1, lr=0.0)
    unit = atoms / atoms.norm(dim=1, keepdim=True)
    torch.testing.assert_close(explainer.get_dictionary(), unit)
    codes = (rows - rows.mean(0)) @ unit.T
    best = explainer.encode_activations(rows).max(1).values
    torch.testing.assert_close(best, codes.max(1).values.relu(), rtol=1e-4, atol=1e-4)


# --- criteria -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIVE)
@pytest.mark.parametrize(
    "criterion",
    [
        MSELoss,
        SAELossClasses.MSE,
        SAELossClasses.DeadNeuronsReanimation,
        DeadNeuronsReanimation(0.1),
        nn.Module,
    ],
)
def test_criteria_of_every_form(new: Any, rows: Tensor, kind: str, criterion: Any) -> None:
    """Classes, instances, members; of matching pursuit, too, whose pre-codes overcomplete has in another shape."""

    class Own(nn.Module):
        def forward(self, x: Tensor, x_hat: Tensor, *rest: Tensor) -> Tensor:
            assert [tuple(part.shape) for part in rest] == [
                (len(x), 24),
                (len(x), 24),
                (24, x.shape[1]),
            ]
            return (x - x_hat).abs().mean()

    history = new(kind).fit(rows, criterion=Own if criterion is nn.Module else criterion, **QUICK)
    assert history["loss"][-1] < history["loss"][0]


def test_the_criteria_are_their_formulas() -> None:
    """By hand."""
    x, x_hat = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    pre, codes = torch.tensor([[-1.0, 3.0, 5.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    atoms = torch.eye(3, 2)
    assert MSELoss()(x, x_hat, pre, codes, atoms) == 2.5
    found = DeadNeuronsReanimation(0.3)(x, x_hat, pre, codes, atoms)
    assert float(found) == pytest.approx(2.5 - 0.3 * (-1 + 5) / 3)


def test_the_default_loss_of_each_kind(new: Any, rows: Tensor) -> None:
    """Penalties make codes fewer, down to the target."""
    many = new("SAE", l1=0).fit(rows, **{**QUICK, "nb_epochs": 10})["l0"][-1]
    few = new("SAE", l1=8).fit(rows, **{**QUICK, "nb_epochs": 10})["l0"][-1]
    assert few < many / 2
    found = {
        weight: new("JumpSAE", target_l0=2, l0=weight).fit(
            rows, **{**QUICK, "nb_epochs": 40, "lr": 2e-2}
        )["l0"][-1]
        for weight in (0, 1, 20)
    }
    assert found[0] > 6
    assert 2 <= found[20] < found[1] < 3


def test_dead_concepts_are_revived(splitter: Any, rows: Tensor, d: int) -> None:
    """Concepts that cannot fire get gradients, if and only if they have been idle for the window."""
    explainer = TopKSAEConcepts(splitter, nb_concepts=24, top_k=2)
    moved = {}
    for window in (1, 10_000):
        model: Any = copy.deepcopy(explainer.concept_model)
        model.begin(rows.mean(0), torch.tensor(1.0))
        with torch.no_grad():
            # Never among the two largest, but not below zero.
            model.linear.weight[:12] = 0
            model.linear.bias[:12] = 1e-6
        before = model.linear.weight.detach().clone()
        trainer = Trainer(model, TrainingOptions(), n_steps=10, dead_window=window)
        for _ in range(9):
            trainer.train(rows)
        # One may have been, where fewer than two others are above zero.
        never = trainer.idle == 9 * len(rows)
        assert int(never.sum()) >= 5
        moved[window] = (model.linear.weight.detach() - before)[never].abs().max()
    assert moved[1] > 0
    assert moved[10_000] == 0


# --- half precision -----------------------------------------------------------------------------------------


class _Overflow(nn.Module):
    """Infinite in half precision, on the batches it is told."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.seen = bad, 0
        self.is_half: list[bool] = []

    def forward(self, x: Tensor, x_hat: Tensor, *rest: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu")
        self.is_half.append(half)
        loss = (x - x_hat).square().mean()
        number = self.seen
        self.seen += not (half and number in self.bad)
        return loss * float("nan") if half and number in self.bad else loss


@pytest.mark.parametrize("dtype", [True, torch.bfloat16, torch.float16])
def test_half_precision_learns(new: Any, rows: Tensor, dtype: Any) -> None:
    """On the CPU, in both half precisions, to nearly the figures of full precision."""
    full = new().fit(rows, **QUICK)
    half = new().fit(rows, use_amp=dtype, **QUICK)
    assert half["nan_fallbacks"] == [0, 0]
    assert half["explained_variance"][-1] == pytest.approx(full["explained_variance"][-1], abs=0.05)


def test_a_nan_batch_is_done_again(new: Any, rows: Tensor) -> None:
    """In full precision, and counted; the next is in half precision again."""
    criterion = _Overflow({1, 3})
    history = new().fit(rows, use_amp=torch.bfloat16, criterion=criterion, **QUICK)
    assert history["nan_fallbacks"] == [2, 0]
    assert criterion.seen == 10
    assert criterion.is_half[:6] == [True, True, False, True, True, False]


def test_after_too_many_the_rest_is_in_full_precision(new: Any, rows: Tensor) -> None:
    """Every batch takes its step: overcomplete leaves out the rest of the epoch."""
    criterion = _Overflow(set(range(5)))
    history = new().fit(
        rows, use_amp=True, criterion=criterion, max_nan_fallbacks=2, monitoring=1, **QUICK
    )
    assert history["nan_fallbacks"] == [2, 0]
    assert len(history["step_loss"]) == 10
    assert criterion.is_half == [True, False] * 2 + [False] * 3 + [True] * 5


def test_upstream_leaves_out_the_rest(rows: Tensor, d: int) -> None:
    """The fault: 2 of 5 batches are trained on."""
    import overcomplete.sae as upstream
    from overcomplete.sae.train import train_sae_amp

    model = upstream.SAE(d, 24)
    adam = torch.optim.Adam(model.parameters())
    steps = []
    adam.register_step_post_hook(lambda *_: steps.append(1))
    criterion = _Overflow(set(range(5)))
    train_sae_amp(
        model,
        rows.split(64),
        criterion,
        adam,
        nb_epochs=1,
        device="cpu",
        monitoring=0,
        max_nan_fallbacks=2,
    )
    assert len(steps) < 3


def test_nan_in_full_precision_is_an_error(new: Any, rows: Tensor) -> None:
    """With and without half precision; what was there stays."""
    for amp in (False, True):
        explainer = new()
        with pytest.raises(InputError, match="lower"):
            explainer.fit(
                rows,
                use_amp=amp,
                criterion=lambda x, x_hat, *_: (x_hat * float("nan")).sum(),
                **QUICK,
            )
        assert not explainer.is_fitted


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:, :-1], "wide"),
        (lambda x: x[:0], "no activations"),
        (lambda x: [], "no activations"),
        (lambda x: x[None], r"floats \[n"),
        (lambda x: x.long(), r"floats \[n"),
        (lambda x: (x, None), "NoneType"),
        (lambda x: x.index_fill(0, torch.tensor([17, 20]), float("nan")), "row 17"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("inf")), "row 3"),
        (lambda x: x[:1].expand(9, -1), "equal"),
    ],
)
def test_bad_activations(new: Any, rows: Tensor, change: Any, said: str) -> None:
    """What was fitted before goes on as it was."""
    explainer = new()
    explainer.fit(rows, **QUICK)
    before = explainer.encode_activations(rows)
    with pytest.raises(InputError, match=said):
        explainer.fit(change(rows), overwrite=True, **QUICK)
    assert torch.equal(explainer.encode_activations(rows), before)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"nb_epochs": 0},
        {"seed": -1},
        {"max_nan_fallbacks": -1},
        {"dead_window": 0},
        {"resume": True},
        {"criterion": 3},
        {"criterion": lambda *given: 1.0},
        {"criterion": lambda x, x_hat, *rest: (x - x_hat).square()},
        {"use_amp": torch.int8},
    ],
)
def test_bad_options_of_a_fit(new: Any, rows: Tensor, options: Any) -> None:
    """None of them changes anything."""
    explainer = new()
    with pytest.raises(InputError):
        explainer.fit(rows, **{**QUICK, **options})
    assert not explainer.is_fitted


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SAE", {"nb_concepts": 0}),
        ("SAE", {"l1": -1}),
        ("SAE", {"top_k": 3}),
        ("TopKSAE", {"top_k": 25}),
        ("TopKSAE", {"top_k": 0}),
        ("TopKSAE", {"encoder_module": "no such"}),
        ("TopKSAE", {"dictionary_params": {"no_such": 1}}),
        ("TopKSAE", {"dictionary_params": {"initializer": torch.ones(3, 3)}}),
        ("BatchTopKSAE", {"top_k": 25}),
        ("JumpSAE", {"kernel": "no such"}),
        ("JumpSAE", {"bandwidth": 0.0}),
        ("JumpSAE", {"target_l0": 25}),
        ("MpSAE", {"k": 25}),
        ("MpSAE", {"dropout": 2.0}),
        ("MpSAE", {"encoder_module": "linear"}),
        ("QSAE", {"q": 1}),
    ],
)
def test_bad_options_of_a_kind(new: Any, kind: str, options: Any) -> None:
    """Said when it is made."""
    with pytest.raises(InputError):
        new(kind, **options)


def test_twice_only_on_purpose(new: Any, rows: Tensor) -> None:
    """A second fit starts anew, and says so; it does not go on in silence, as interpreto's does."""
    explainer = new()
    told = explainer.fit(rows, **QUICK)
    before = explainer.encode_activations(rows)
    with pytest.raises(InputError, match="overwrite=True"):
        explainer.fit(rows + 1, **QUICK)
    assert torch.equal(explainer.encode_activations(rows), before)
    assert explainer.fit(rows, overwrite=True, **QUICK) == told


def test_before_fitting(new: Any, rows: Tensor, tmp_path: Any) -> None:
    """Nothing is given out."""
    explainer = new()
    uses: list[Callable[[], Any]] = [
        lambda: explainer.encode_activations(rows),
        lambda: explainer.decode_concepts(rows),
        explainer.get_dictionary,
        lambda: explainer.b_dec,
        lambda: explainer.save(tmp_path / "sae"),
        lambda: explainer.concept_output_gradient(["hello"]),
    ]
    for use in uses:
        with pytest.raises(NotFittedError, match="call fit"):
            use()
    assert issubclass(NotFittedError, RuntimeError)


@pytest.mark.usefixtures("unchecked")
def test_wrong_rows_and_codes(new: Any, rows: Tensor) -> None:
    """Of another width, shape or kind of number."""
    explainer = new()
    explainer.fit(rows, **QUICK)
    for given in (rows[:, 1:], rows[0], rows[None], rows.long()):
        with pytest.raises(InputError, match="activations are"):
            explainer.encode_activations(given)
        with pytest.raises(InputError, match="concepts are"):
            explainer.decode_concepts(given)


def test_what_interpreto_does_not_do_either(new: Any) -> None:
    """Interpretations are objects of their own."""
    with pytest.raises(NotImplementedError, match="TopKInputs"):
        new().interpret(inputs=["a"])
    with pytest.raises(TypeError, match="abstract"):
        SAEExplainer(new().splitter, nb_concepts=3)


def test_optimizer_options_stay_the_callers(new: Any, rows: Tensor) -> None:
    """Interpreto writes lr into the dict it is given, and into its own default."""
    kwargs = {"momentum": 0.9}
    history = new().fit(
        rows, optimizer_class=torch.optim.SGD, optimizer_kwargs=kwargs, monitoring=1, **QUICK
    )
    assert kwargs == {"momentum": 0.9}
    assert history["lr"][0] == 3e-3
    history = new().fit(rows, optimizer_kwargs={"lr": 0.5}, monitoring=1, **QUICK)
    assert history["lr"][0] == 0.5


# --- where --------------------------------------------------------------------------------------------------


def test_a_bridge_a_splitter_and_their_names(splitter: Any, d: int) -> None:
    """The same place by all ways to it."""
    bridge = splitter.bridge
    several = ModelWithSplitPoints(bridge, split_points=[0, 1])
    found = [
        TopKSAEConcepts(splitter, nb_concepts=9),
        TopKSAEConcepts(splitter, nb_concepts=9, split_point="blocks.1.hook_resid_post"),
        TopKSAEConcepts(bridge, nb_concepts=9, split_point=1),
        TopKSAEConcepts(bridge, nb_concepts=9, split_point=POINT),
        TopKSAEConcepts(several, nb_concepts=9, split_point=1),
        TopKSAEConcepts(several, nb_concepts=9, split_point="blocks.1.hook_resid_post"),
    ]
    assert {(own.split_point, own.d) for own in found} == {(POINT, d)}
    assert all(own.splitter.bridge is bridge for own in found)
    heads = TopKSAEConcepts(bridge, nb_concepts=9, split_point="blocks.1.attn.hook_z")
    assert heads.d == d
    for source, point, error in (
        (bridge, None, InputError),
        (several, None, InputError),
        (splitter, 0, InputError),
        (bridge, "no.such", UnknownPointError),
        (bridge, 99, IndexError),
        ("gpt2", 1, TypeError),
    ):
        with pytest.raises(error):
            TopKSAEConcepts(source, nb_concepts=9, split_point=point)


def test_moving(new: Any, rows: Tensor) -> None:
    """Everything goes to the device."""
    explainer = new("BatchTopKSAE")
    explainer.fit(rows, **QUICK)
    assert explainer.to("meta").device.type == "meta"
    assert explainer.get_dictionary().device.type == "meta"


@pytest.mark.parametrize("kind", ["TopKSAE", "MpSAE"])
def test_gradients_of_outputs(new: Any, splitter: Any, rows: Tensor, kind: str) -> None:
    """Against the chain rule by hand: the model's gradient at the reconstruction, times the atoms."""
    explainer = new(kind)
    text = "hello there"
    acts, _ = splitter.get_activations([text])
    explainer.fit(torch.cat([rows, acts]), **QUICK)
    (found,) = explainer.concept_output_gradient(
        [text], targets=[-1], concepts_x_gradients=False, normalization=False
    )
    codes = explainer.encode_activations(acts)
    assert found.shape == (1, len(acts), 24)
    leaf = explainer.decode_concepts(codes).requires_grad_()
    ids = splitter.tokenizer(text, return_tensors="pt")["input_ids"]
    bridge: TransformerBridge = splitter.bridge
    logits = bridge.run_with_hooks(
        ids, return_type="logits", fwd_hooks=[(POINT, lambda x, hook: leaf[None])]
    )
    (grad,) = torch.autograd.grad(logits[0, -1].max(), leaf)
    torch.testing.assert_close(found[0], grad @ explainer.get_dictionary().T, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="concepts at"):
        explainer.concept_output_gradient([text], split_point=0)


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIVE)
def test_going_on_is_as_never_stopped(
    new: Any, rows: Tensor, tmp_path: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with a scheduler, after an epoch that was cut short."""
    options: dict[str, Any] = {
        **QUICK,
        "nb_epochs": 4,
        "scheduler_class": torch.optim.lr_scheduler.StepLR,
        "scheduler_kwargs": {"step_size": 3, "gamma": 0.7},
    }
    whole = new(kind)
    told = whole.fit(rows, **options)
    path = tmp_path / "fit.safetensors"
    train, seen = Trainer.train, []

    def stop(trainer: Trainer, batch: Tensor) -> None:
        seen.append(batch)
        if len(seen) == 13:
            raise KeyboardInterrupt
        train(trainer, batch)

    monkeypatch.setattr(Trainer, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        new(kind).fit(rows, checkpoint=path, **options)
    seen.clear()
    rest = new(kind)
    assert rest.fit(rows, checkpoint=path, resume=True, **options) == told
    assert torch.equal(rest.encode_activations(rows), whole.encode_activations(rows))
    assert torch.equal(rest.get_dictionary(), whole.get_dictionary())
    assert len(seen) == 10


def test_checkpoints_of_others(new: Any, rows: Tensor, tmp_path: Any) -> None:
    """Other options, other rows, and files that are none."""
    path = tmp_path / "fit.safetensors"
    new().fit(rows, checkpoint=path, **QUICK)
    go_on: dict[str, Any] = {"checkpoint": path, "resume": True, **QUICK}
    for explainer, given, changed in (
        (new("BatchTopKSAE"), rows, {}),
        (new(top_k=2), rows, {}),
        (new(), rows[:-1], {}),
        (new(), rows + 1, {}),
        (new(), rows, {"lr": 1e-2}),
        (new(), rows, {"seed": 4}),
    ):
        with pytest.raises(InputError, match="another fit"):
            explainer.fit(given, **{**go_on, **changed})
        assert not explainer.is_fitted
    path.write_text("nothing")
    with pytest.raises(InputError, match="checkpoint"):
        new().fit(rows, **go_on)


def test_states_that_no_checkpoint_can_hold(new: Any, rows: Tensor, tmp_path: Any) -> None:
    """Said, and not left out."""
    with pytest.raises(InputError, match="scheduler"):
        new().fit(
            rows,
            checkpoint=tmp_path / "x",
            scheduler_class=torch.optim.lr_scheduler.MultiStepLR,
            scheduler_kwargs={"milestones": [2, 3]},
            **QUICK,
        )


def test_kinds_are_where_they_are_looked_for() -> None:
    """The five of interpreto, and overcomplete's others."""
    assert KINDS["SAE"] is VanillaSAEConcepts
    assert KINDS["JumpSAE"] is JumpReLUSAEConcepts
    assert KINDS["MpSAE"] is MpSAEConcepts
    assert KINDS["RATopKSAE"] is RATopKSAEConcepts
    for kind in KINDS.values():
        assert kind.has_differentiable_concept_encoder
        assert kind.has_differentiable_concept_decoder
