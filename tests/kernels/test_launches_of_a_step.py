"""What the host does for a step of the Triton path: launches, what it sends and reads, what a broken step leaves."""

import pytest
import torch
from comparison import SoapRun, needs_engine, random_gradients, random_params
from lockstep import OPTIONS, lockstep
from step_comparison import compare_step

import soap_opt
from bench.fake_driver import watched
from soap_opt.cuda import follow, memory
from soap_opt.cuda import launch as launching
from soap_opt.cuda import plan as plans

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


@pytest.mark.parametrize(
    ("shapes", "options", "count"),
    [
        ([(6, 5), (7, 3), (5, 4)], {}, 5),  # matrices
        ([(6, 5), (5,), (), (6, 9, 4)], {}, 7),
        ([(9, 10, 11, 12), (6, 5), (3, 4, 3, 3)], {}, 9),  # 4-D
        ([(9, 10, 3, 3), (9,), (6, 5)], {}, 7),  # 3 x 3 is one Kronecker product
        ([(5,), (7,)], {"precondition_1d": True}, 3),
        ([(40, 5, 5)], {"max_precond_dim": 16}, 4),  # a Kronecker product alone cannot be used by the launch that makes it
        ([(5,), (7,)], {}, 2),  # the norm before the update
        ([(5,), (7,)], {"normalize_grads": True}, 3),  # and its rms before it is applied
    ],
)
def test_launches_of_a_steady_step(launches, shapes, options, count):
    run = SoapRun(random_params(shapes), fused=True, **{**OPTIONS, **options, "precondition_frequency": 10**6})
    for grads in random_gradients(shapes, 2):
        launches.clear()
        run.step(grads)
    assert len(launches) == count, launches
    orders = [len(run.optimizer._layout(p, run.optimizer.param_groups[0]).modes) for p in run.params]
    assert count <= 1 + 2 * max(orders) or max(orders) == 0


GROUPS = [
    {"lr": 0.05, "weight_decay": 0.0, "betas": (0.8, 0.97), "max_grad_norm": 3.0, "precondition_frequency": 1},
    {"normalize_grads": True, "maximize": True, "correct_bias": False, "refresh": "together", "shampoo_beta": 0.8},
    {"eps": 1e-3, "precondition_1d": True, "precondition_frequency": 2, "max_precond_dim": 6},
    {"lr": torch.tensor(0.02), "max_grad_norm": 1.0},
]


def in_groups(shapes, flags, seed=0):
    """A run whose parameters, in neighbours of three, belong to GROUPS."""
    run = SoapRun(random_params(shapes, seed), **flags, **OPTIONS)
    groups = [{"params": run.params[3 * i : 3 * i + 3], **options} for i, options in enumerate(GROUPS)]
    run.optimizer = soap_opt.SOAP([group for group in groups if group["params"]], **flags, **OPTIONS)
    return run


def test_groups_share_their_launches(launches):
    """Whatever their options: 9 for all, in lockstep with the specification group by group."""
    shapes = [(6, 5), (4, 3, 3, 3), (4,), (7, 3), (5,), (5, 5), (9, 2), (3,), (2, 3, 4), (8, 3), (3, 3, 3), (6,)]
    reference, tested = in_groups(shapes, {"foreach": False}), in_groups(shapes, {"fused": True})
    for number, grads in enumerate(random_gradients(shapes, 4, missing=0.05)):
        before = []
        for i, param in enumerate(reference.params):
            before.append((param.detach().clone(), {key: value.clone() for key, value in reference.state_of(i).items()}))
            if before[i][1]:
                tested.adopt(i, *before[i])
        for run in (reference, tested):
            run.step(grads)
        for i, (param, state) in enumerate(before):
            options, group = {**OPTIONS, **GROUPS[i // 3]}, grads[i // 3 * 3 : i // 3 * 3 + 3]
            grad = grads[i]
            if grad is not None and "max_grad_norm" in options:  # bounds are of the gradient that counts
                norm = torch.stack([g.norm() for g in group if g is not None]).norm()
                grad = grad * (options["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
            after, got = ((run.params[i].detach(), run.state_of(i)) for run in (reference, tested))
            compare_step(param, state, grad, after, got, options, f"step {number}, parameter {i}")
    launches.clear()
    tested.step(random_gradients(shapes, 1)[0])
    assert len([name for name in launches if name != "reexpress_kernel"]) <= 9


def test_groups_of_matrices_take_the_launches_of_one(launches):
    shapes = [(6, 5), (7, 3), (5, 4), (9, 2), (3, 8), (4, 4)]
    run = in_groups(shapes, {"fused": True})
    for group in run.optimizer.param_groups:
        group["precondition_frequency"] = 10**6
    for grads in random_gradients(shapes, 2):
        launches.clear()
        run.step(grads)
    assert len(launches) == 5


def test_dtypes_multiply_only_the_gram_and_the_first_projection(launches):
    params = random_params([(6, 5)]) + random_params([(6, 5), (5,)], dtype=torch.bfloat16)
    run = SoapRun(params, fused=True, **{**OPTIONS, "precondition_frequency": 10**6})
    gradients = [[grad.to(p.dtype) for grad, p in zip(grads, params)] for grads in random_gradients([(6, 5), (6, 5), (5,)], 2)]
    run.step(gradients[0])
    run.step(gradients[1])
    assert launches == ["project_first_kernel"] * 2 + ["gram_ema_kernel"] * 2 + ["project_adam_kernel", "project_kernel",
                                                                                 "project_apply_kernel"]  # fmt: skip


@needs_engine
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precision_is_that_of_the_projections_alone(precision, monkeypatch):
    """Grams, and what turns m after a refresh, are full float32 always."""
    seen = {}

    def note(launch, kernel, arguments, constants):
        seen.setdefault(kernel.fn.__name__, set()).add(constants.get("PRECISION"))
        launch()

    monkeypatch.setattr(launching, "kernel_for", watched(note))
    run = SoapRun(random_params([(6, 5), (4, 3, 6)]), fused=True, precision=precision, **OPTIONS)
    for grads in random_gradients([(6, 5), (4, 3, 6)], 4):
        run.step(grads)
    projections = {"highest": "tf32x3", "high": "tf32"}[precision]
    names = ["project_first_kernel", "project_kernel", "project_adam_kernel", "project_apply_kernel"]
    exact = dict.fromkeys(["gram_ema_kernel", "reexpress_kernel"], {"tf32x3"})
    assert seen == {**exact, **{name: {projections} for name in names}}


def test_a_step_broken_off_after_t_has_moved(monkeypatch):
    """The host reads t again."""
    run = SoapRun(random_params([(70, 5), (4,)]), fused=True, **OPTIONS)
    gradients = random_gradients([(70, 5), (4,)], 4)
    for grads in gradients[:2]:
        run.step(grads)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(launch, kernel, arguments, constants):
            if "gram" in kernel.fn.__name__:
                raise KeyboardInterrupt
            launch()

        patch.setattr(launching, "kernel_for", watched(interrupted))
        run.step(gradients[2])
    assert float(run.state_of(0)["step"]) == 2
    run.step(gradients[3])
    for i in range(2):
        assert run.optimizer._cuda.following.of(run.state_of(i)["exp_avg"]).catch_up() == float(run.state_of(i)["step"]) == 3


def test_a_step_that_was_broken_off_leaves_no_counts(monkeypatch):
    run = SoapRun(random_params([(70, 5), (4,)]), fused=True, max_grad_norm=1.0, **OPTIONS)
    gradients = random_gradients([(70, 5), (4,)], 4)
    for grads in gradients[:2]:
        run.step(grads)
    (plan,) = run.optimizer._cuda.plans(run.state_of(0)["exp_avg"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(*_):
            plan.counters.fill_(1)
            raise KeyboardInterrupt

        patch.setattr(launching, "kernel_for", watched(interrupted))
        run.step(gradients[2])
    before = run.params[1].detach().clone()
    run.step(gradients[3])
    assert not plan.counters.any() and not torch.equal(before, run.params[1])


def test_pointers_are_sent_only_when_they_changed(monkeypatch):
    sent = []
    original = memory.DeviceTable.send

    def send(self, source, *make):
        before = self.source
        original(self, source, *make)
        sent.append((self.tensor.dtype, self.source is not before))

    monkeypatch.setattr(memory.DeviceTable, "send", send)
    made = []
    monkeypatch.setattr(plans, "make_tables", lambda *a, _f=plans.make_tables: made.append(a) or _f(*a))
    shapes = [(6, 5), (5, 4, 3, 3)]
    run = SoapRun(random_params(shapes), fused=True, **{**OPTIONS, "precondition_frequency": 10**6})
    run.step(random_gradients(shapes, 1)[0])
    kept = []
    for number in range(6):
        if number == 3:  # new memory for a gradient; the old one is kept, lest the new one gets its address
            kept.append(run.params[0].grad)
            run.params[0].grad = run.params[0].grad.clone()
        if number == 4:
            run.optimizer.param_groups[0]["lr"] /= 2
        run.optimizer.step()
    assert [new for dtype, new in sent if dtype == torch.int64] == [True, False, False, True, False, False]
    assert [new for dtype, new in sent if dtype == torch.float32] == [True, False, False, False, True, False]  # the options
    assert len(made) == 1


def test_the_host_reads_t_once_and_then_follows(monkeypatch):
    """No host synchronisation in a steady step: t is read when it is not known, and again when somebody wrote to it."""
    made = []
    original = follow.Followed.__setattr__

    def watched(self, name, value):
        if name == "identity" and value is not None:
            made.append(self)
        original(self, name, value)

    monkeypatch.setattr(follow.Followed, "__setattr__", watched)
    shapes = [(6, 5), (4, 3, 3)]
    run = SoapRun(random_params(shapes), fused=True, **OPTIONS)
    gradients = random_gradients(shapes, 9)
    gradients[4][0][0, 0] = torch.nan
    for number, grads in enumerate(gradients):
        if number == 7:
            run.state_of(0)["step"].fill_(20.0)
        run.step(grads)
    known = [run.optimizer._cuda.following.of(run.state_of(i)["exp_avg"]) for i in range(2)]
    assert made == [*known, known[0]]
    steps = [each.catch_up() for each in known]
    assert steps == [22, 8] == [int(run.state_of(i)["step"]) for i in range(2)]


def test_a_model_larger_than_the_scratch_is_stepped_in_pieces(launches):
    shapes = [(6, 5), (5,), (9, 4), (7, 3, 2)]
    limited = {"scratch_limit": 8 * 40}
    assert lockstep(shapes, 4, {"max_grad_norm": 1e6, **limited}) > 3
    run = SoapRun(random_params(shapes), fused=True, **{**OPTIONS, "precondition_frequency": 10**6, **limited})
    for grads in random_gradients(shapes, 2):
        launches.clear()
        run.step(grads)
    assert len(launches) == 3 * 5  # (6, 5) and (5,); (9, 4); (7, 3, 2), two of whose modes are one product
