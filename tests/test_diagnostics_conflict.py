"""Alignment against its formula, and that a measured run is the run that was not measured."""

import copy
import csv
import math
import pickle

import pytest
import torch
from torch import nn

import soap_opt
from soap_opt import SOAP
from soap_opt.diagnostics import ConflictMeter, alignment, preconditioner_of
from soap_opt.diagnostics.conflict import CHUNK, _grams

OPTIMIZERS = {
    "SOAP": lambda params: SOAP(params, lr=1e-2, precondition_frequency=2),
    "SOAP single": lambda params: SOAP(params, lr=1e-2, foreach=False, precondition_1d=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, foreach=True),
    "Adam fused": lambda params: torch.optim.Adam(params, lr=1e-2, fused=True, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# ---- alignment ----


def by_formula(vectors):
    mean = torch.stack([v.double() / v.double().norm() for v in vectors]).mean(0)
    return float(2 * mean.square().sum() - 1)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_alignment_is_its_formula(n, dtype):
    generator = torch.Generator().manual_seed(n)
    vectors = [torch.randn(4, 3, generator=generator).to(dtype) for _ in range(n)]
    assert alignment(vectors) == pytest.approx(by_formula(vectors), abs=1e-14)
    if n == 2:
        assert alignment(vectors) == pytest.approx(float(torch.cosine_similarity(*(v.double().flatten() for v in vectors), 0)))


def test_alignment_of_known_vectors():
    e = torch.eye(3)
    assert alignment([e[0], 3 * e[0]]) == 1 and alignment([e[0], -e[0]]) == -1
    assert alignment([e[0], e[1]]) == pytest.approx(0, abs=1e-15)
    assert alignment(e) == pytest.approx(2 / 3 - 1)
    assert alignment([e[0], e[0], -e[0]]) == pytest.approx(2 / 9 - 1)
    assert alignment([e[0]]) == 1
    turned = [torch.tensor([1.0, 0.0]), torch.tensor([math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)])]
    assert alignment([*turned, -turned[0] - turned[1]]) == pytest.approx(-1)


def test_alignment_of_vectors_in_pieces():
    a, b = torch.randn(2, 7)
    whole = alignment([a, b])
    assert alignment([[a[:3], a[3:]], [b[:3], b[3:]]]) == pytest.approx(whole)
    assert alignment([[a, None], [b, torch.zeros(5)]]) == pytest.approx(whole)
    assert alignment([[None, a], [a, None]]) == pytest.approx(0, abs=1e-15)


F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize(("scale", "dtype"), [(1e-30, F32), (1e-44, F32), (1e30, F32), (1e-200, F64), (1e200, F64)])
def test_no_scale_underflows_or_overflows(scale, dtype):
    a, b = (torch.tensor(v, dtype=torch.float64).mul(scale).to(dtype) for v in ([1.0, 0.0], [1.0, 1.0]))
    assert alignment([a, b]) == pytest.approx(0.5**0.5)
    assert alignment([a, torch.ones(2)]) == pytest.approx(0.5**0.5)


def test_nan_where_there_is_no_direction():
    x = torch.ones(3)
    for other in (torch.zeros(3), torch.tensor([1, math.nan, 0]), torch.tensor([1, math.inf, 0])):
        assert math.isnan(alignment([x, other]))
    assert math.isnan(alignment([])) and math.isnan(alignment([torch.ones(0), torch.ones(0)]))


def test_vectors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"one shape, got \(3,\), \(2,\)"):
        alignment([torch.ones(3), torch.ones(2)])
    with pytest.raises(ValueError, match="as many pieces each, got 1, 2"):
        alignment([torch.ones(3), [torch.ones(3), None]])


def test_large_vectors_are_added_in_chunks():
    a = torch.ones(CHUNK + 3)
    assert torch.equal(_grams([[a], [a]])[0], torch.full((2, 2), CHUNK + 3.0, dtype=torch.float64))


# ---- the meter ----


class Net(nn.Module):
    """A shared layer with dropout, one that only the second loss reaches, a convolution, and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.own, self.frozen = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 3)
        self.convolution = nn.Conv2d(1, 2, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(nn.functional.dropout(self.shared(x), 0.2))
        h = h + self.convolution(x.reshape(1, 1, -1, 6)).square().mean()
        return h.square().mean(), (self.frozen(self.own(h)) - 1).square().mean()


def run(make, steps=7, meter_options=None):
    """(net, optimizer, meter) after a few steps, from one seed."""
    net = Net()
    optimizer = make(net.parameters())
    meter = ConflictMeter(optimizer, model=net, **meter_options) if meter_options else None
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        rate, distortion = net(torch.randn(8, 6))
        if meter and meter.due():
            meter.measure(rate, distortion)
        (rate + distortion).backward()
        optimizer.step()
    return net, optimizer, meter


@every_optimizer
@pytest.mark.parametrize("every", [1, 2, 3])
def test_training_is_the_same_with_and_without(make, every):
    (net, optimizer, _), (watched, other, meter) = run(make), run(make, meter_options={"every": every})
    assert [row["step"] for row in meter.records] == list(range(every, 8, every))
    for p, q in zip(net.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q) and p._version == q._version
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][key])), key
    if isinstance(optimizer, SOAP):
        assert optimizer.skipped_steps() == other.skipped_steps() == 0


def test_the_generator_is_where_it_would_be():
    run(OPTIMIZERS["SOAP"])
    state = torch.get_rng_state()
    run(OPTIMIZERS["SOAP"], meter_options={"every": 1})
    assert torch.equal(torch.get_rng_state(), state)


@every_optimizer
def test_records_are_what_alignment_says(make):
    net, optimizer, _ = run(make)
    params = list(net.parameters())
    meter = ConflictMeter(optimizer, every=2, model=net, step=8)
    at = []  # parameters
    for k in range(2):
        at.append([p.detach().clone() for p in params])
        rate, distortion = net(torch.randn(8, 6))
        if k == 1:
            grads = [
                torch.autograd.grad(x, params[:4] + params[6:], retain_graph=True, allow_unused=True)
                for x in (rate, distortion)
            ]
            grads = [[*g[:4], None, None, *g[4:]] for g in grads]
            updates = [preconditioner_of(optimizer)(g) for g in grads]
            assert meter.due()
            meter.measure(rate, distortion)
            assert not meter.due()
        optimizer.zero_grad()
        (rate + distortion).backward()
        optimizer.step()
    at.append([p.detach().clone() for p in params])
    moved = [[b - a for a, b in zip(*pair)] for pair in zip(at, at[1:])]
    (record,) = meter.records
    assert record["step"] == 10
    shared = [0, 1, 6, 7]  # layer "own" has no gradient of the rate
    for name, pair in (("raw", grads), ("preconditioned", updates)):
        assert record[name] == pytest.approx(alignment(pair), abs=1e-12)
        assert record[f"{name}_shared"] == pytest.approx(alignment([[v[i] for i in shared] for v in pair]), abs=1e-12)
    assert record["between_steps"] == pytest.approx(alignment(moved), abs=1e-12)
    assert 0 < record["seconds"] < 60
    rows = {row["parameter"]: row for row in meter.by_parameter}
    assert list(rows) == [name for name, _ in net.named_parameters()]
    for i, (name, _) in enumerate(net.named_parameters()):
        for column, pair in (("raw", grads), ("preconditioned", updates), ("between_steps", moved)):
            vectors = [v[i] for v in pair]
            want = alignment(vectors) if all(v is not None for v in vectors) else math.nan
            assert rows[name][column] == pytest.approx(want, abs=1e-12, nan_ok=True), (name, column)


def quadratic(losses, steps, every=1, make=None, **options):
    """A meter after steps of one parameter under given linear losses: of each step the list of their gradients."""
    param = nn.Parameter(torch.zeros(2))
    optimizer = (make or (lambda params: torch.optim.SGD(params, lr=0.1)))([param])
    meter = ConflictMeter(optimizer, every=every, **options)
    for k in range(steps):
        values = [param @ torch.tensor(g) for g in losses(k)]
        optimizer.zero_grad()
        if meter.due():
            meter.measure(*values)
        sum(values).backward()
        optimizer.step()
    return meter


def test_steps_that_go_on_and_steps_that_turn_back():
    on = quadratic(lambda k: ([1.0, 0.0], [0.0, 1.0]), 4)
    assert math.isnan(on.records[0]["between_steps"])  # there was no step before
    assert on.records.column("between_steps")[1:] == pytest.approx([1, 1, 1])
    back = quadratic(lambda k: ([(-1.0) ** k, 0.0], [(-1.0) ** k, 0.0]), 4)
    assert back.records.column("between_steps")[1:] == pytest.approx([-1, -1, -1])
    assert back.records.column("raw") == pytest.approx([1] * 4)
    assert [row["parameter"] for row in back.by_parameter] == ["0"] * 4


def test_three_losses():
    meter = quadratic(lambda k: ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]), 1)
    e, f = torch.eye(2)
    assert meter.records[0]["raw"] == pytest.approx(by_formula([e, f, e]))


def test_the_scale_of_a_loss_makes_no_difference():
    meters = [quadratic(lambda k, s=s: ([s, 0.0], [s, s]), 2) for s in (1.0, 1e-30)]
    assert [meter.records[1]["raw"] for meter in meters] == pytest.approx([0.5**0.5] * 2)


def test_grad_scaler_with_scaled_losses():
    param = nn.Parameter(torch.tensor([0.3, -0.2]))
    optimizer = torch.optim.Adam([param], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    meter = ConflictMeter(optimizer, every=2)
    for k in range(4):
        optimizer.zero_grad()
        one, two = param.square().sum(), (param[0] - 1).square()
        if meter.due():
            meter.measure(scaler.scale(one), scaler.scale(two))
            want = alignment([2 * param.detach(), torch.tensor([2 * (param[0].item() - 1), 0.0])])
        scaler.scale(one + two).backward()
        if k == 2:
            param.grad[0] = math.inf  # a step that is not made does not count
        scaler.step(optimizer)
        scaler.update()
    assert meter.step == 3 and [row["step"] for row in meter.records] == [2]
    assert meter.records[0]["raw"] == pytest.approx(want, rel=1e-6)


def test_groups_count_by_their_learning_rates():
    """(1, 1) and (1, -1) in two groups, of which the second hardly learns: the updates agree, the gradients do not."""
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [params[0]], "lr": 1.0}, {"params": [params[1]], "lr": 1e-3}])
    meter = ConflictMeter(optimizer, every=1)
    for lr in (1.0, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.param_groups[1]["lr"] = 1e-3 * lr
        optimizer.zero_grad()
        losses = params[0] + params[1], params[0] - params[1]
        meter.measure(*losses)
        sum(losses).backward()
        optimizer.step()
    assert meter.records.column("raw") == pytest.approx([0, 0])
    assert meter.records.column("preconditioned") == pytest.approx([1, 0], abs=1e-5)
    assert math.isnan(meter.records[1]["between_steps"])  # nothing moved


def test_a_group_that_does_not_learn_has_no_part_in_the_model_s_updates():
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [params[0]], "lr": 1.0}, {"params": [params[1]], "lr": 0.0}])
    meter = ConflictMeter(optimizer, every=1)
    meter.measure(params[0][0] + params[1].sum(), params[0].sum() - params[1].sum())
    optimizer.step()
    assert meter.records[0]["preconditioned"] == pytest.approx(0.5**0.5)
    assert meter.by_parameter.column("preconditioned") == pytest.approx([0.5**0.5, -1])


def test_degenerate_losses_give_nan_and_no_error():
    for bad in (torch.tensor(1.0), math.nan, 0.0):
        net, optimizer, _ = run(OPTIMIZERS["SOAP"])
        meter = ConflictMeter(optimizer, every=1, model=net)
        rate, distortion = net(torch.randn(8, 6))
        meter.measure(rate, bad if isinstance(bad, torch.Tensor) else distortion * bad)
        optimizer.step()
        (record,) = meter.records
        assert all(math.isnan(record[name]) for name in record if name not in ("step", "seconds"))
        assert optimizer.skipped_steps() == 0


def test_before_the_first_step_and_without_parameters_that_learn():
    """SOAP's first step moves nothing and its second has no second moment yet; a frozen model has no gradients."""
    _, _, meter = run(OPTIMIZERS["SOAP"], steps=3, meter_options={"every": 1})
    assert [math.isnan(x) for x in meter.records.column("preconditioned")] == [True, True, False]
    assert [math.isnan(x) for x in meter.records.column("between_steps")] == [True, True, False]
    assert not any(math.isnan(x) for x in meter.records.column("raw"))
    net = Net()
    optimizer = SOAP(net.parameters())
    net.requires_grad_(False)
    meter = ConflictMeter(optimizer, every=1)
    meter.measure(*net(torch.randn(8, 6)))
    optimizer.step()
    assert len(meter.records) == 1 and math.isnan(meter.records[0]["raw"])


def test_without_measure_steps_are_compared_all_the_same():
    net = Net()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    meter = ConflictMeter(optimizer, every=2)
    for _ in range(4):
        sum(net(torch.randn(8, 6))).backward()
        optimizer.step()
        assert meter._before is None and (meter._last is None) == (meter.step % 2 == 0)
    assert [row["step"] for row in meter.records] == [2, 4]
    for record in meter.records:
        assert math.isnan(record["raw"]) and -1 <= record["between_steps"] <= 1


def test_parameters_are_copied_for_the_measured_step_and_the_one_before_it_alone():
    net = Net()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    meter, copied = ConflictMeter(optimizer, every=4), []
    optimizer.register_step_pre_hook(lambda *_: copied.append(meter._before is not None))  # after the meter's
    for _ in range(8):
        optimizer.step()
    assert copied == [False, False, True, True] * 2


def test_a_step_that_is_not_due_may_be_measured():
    meter = quadratic(lambda k: ([1.0, 0.0], [1.0, 1.0]), 1, every=10)
    param = meter.optimizer.param_groups[0]["params"][0]
    meter.measure(param[0], param.sum())
    meter.optimizer.step()
    assert [row["step"] for row in meter.records] == [2] and meter.records[0]["raw"] == pytest.approx(0.5**0.5)


def test_sparse_and_low_precision_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    meter = ConflictMeter(optimizer, every=1)
    meter.measure(table(torch.tensor([1])).sum(), table(torch.tensor([1, 2])).sum())
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert meter.records[0]["raw"] == pytest.approx(0.5**0.5)
    net = nn.Linear(6, 5).to(torch.bfloat16)
    optimizer = SOAP(net.parameters(), lr=0.1)
    meter = ConflictMeter(optimizer, every=1)
    for _ in range(4):
        y = net(torch.randn(8, 6, dtype=torch.bfloat16)).float()
        meter.measure(y.square().mean(), (y - 1).square().mean())
        optimizer.zero_grad()
        y.sum().backward()
        optimizer.step()
    assert all(-1 <= meter.records[3][name] <= 1 for name in ("raw", "preconditioned", "between_steps"))


def test_groups_that_join_later():
    _, optimizer, meter = run(OPTIMIZERS["Adam"], steps=3, meter_options={"every": 1})
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    optimizer.step()
    assert any(row["step"] == 4 and row["parameter"] == "8" for row in meter.by_parameter)


def test_a_closed_meter_leaves_nothing_behind():
    net, optimizer, _ = run(OPTIMIZERS["SOAP"])
    with ConflictMeter(optimizer, every=1) as meter:
        for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            copied.step()  # a copy is not measured
        assert meter.step == 0
    optimizer.step()
    assert not meter.records and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_table_and_csv(tmp_path):
    _, _, meter = run(OPTIMIZERS["SOAP"], steps=4, meter_options={"every": 2})
    assert str(meter).splitlines()[0].split() == list(meter.records[0])
    meter.records.to_csv(tmp_path / "conflict.csv")
    with open(tmp_path / "conflict.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows][1] == meter.records[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, x: ConflictMeter(nn.Linear(2, 2)), TypeError, "must be a torch.optim.Optimizer, got Linear"),
        (lambda o, x: ConflictMeter(o, every=0), ValueError, "Invalid every value: 0"),
        (lambda o, x: ConflictMeter(o, every=2.5), ValueError, "Invalid every value: 2.5"),
        (lambda o, x: ConflictMeter(o, step=-1), ValueError, "Invalid step value: -1"),
        (lambda o, x: ConflictMeter(o, model="net"), TypeError, "model must be a torch.nn.Module or None, got str"),
        (lambda o, x: ConflictMeter(o).measure(x[0]), ValueError, "two losses or more, got 1"),
        (lambda o, x: ConflictMeter(o).measure(x[0], 3.0), TypeError, "must be tensors, got float as number 2"),
        (lambda o, x: ConflictMeter(o).measure(x, x[0]), ValueError, r"scalars, but number 1 is of shape \(2,\)"),
        (
            lambda o, x: ConflictMeter(o, preconditioner=lambda grads: []).measure(x[0], x[1]),
            ValueError,
            "returned 0 updates for 1 parameters",
        ),
    ],
)
def test_misuse(call, error, message):
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        call(soap_opt.SOAP([x]), x * 2)
