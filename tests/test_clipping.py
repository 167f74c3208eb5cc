"""max_grad_norm is clip_grad_norm_ before the step, in every implementation, and touches no gradient."""

import pytest
import torch
from comparison import SoapRun, random_gradients, random_params, run_lockstep

from soap_opt import _ext
from soap_opt.gradients import clipping_scale

SHAPES = [(6, 5), (4, 3, 3, 3), (4,), (7, 3), ()]
OPTIONS = {"lr": 0.01, "precondition_frequency": 2, "refresh": "together"}


class ClippedRun(SoapRun):
    """The user's own clip_grad_norm_ before each step of the specification."""

    def __init__(self, params, max_norm, **options):
        super().__init__(params, foreach=False, **options)
        self.max_norm = max_norm

    def step(self, grads):
        for param, grad in zip(self.params, grads):
            param.grad = None if grad is None else grad.clone()
        torch.nn.utils.clip_grad_norm_(self.params, self.max_norm)
        self.optimizer.step()


def clipped(grads, max_norm):
    total = torch.stack([grad.float().norm() for grad in grads if grad is not None]).norm()
    return [None if grad is None else grad * (max_norm / (total + 1e-6)).clamp(max=1.0) for grad in grads]


@pytest.mark.parametrize("max_norm", [1.0, 20.0, 1e6])  # all steps are clipped, some are, none is
@pytest.mark.parametrize(
    "flags",
    [
        {"foreach": False},
        {"foreach": True},
        pytest.param({"fused": True}, marks=pytest.mark.skipif(_ext.unavailable("cpu") is not None, reason="not built")),
    ],
    ids=str,
)
def test_lockstep_with_clip_grad_norm(flags, max_norm):
    gradients = random_gradients(SHAPES, 6, missing=0.1)
    reference = ClippedRun(random_params(SHAPES), max_norm, **OPTIONS)
    tested = SoapRun(random_params(SHAPES), max_grad_norm=max_norm, **flags, **OPTIONS)
    # the comparison's tolerances are of the gradient that counts
    seen = [clipped(grads, max_norm) for grads in gradients]
    for number, (grads, small) in enumerate(zip(gradients, seen)):

        class Feed:  # the tested run gets the raw gradients
            params, state_of, adopt = tested.params, tested.state_of, tested.adopt
            step = staticmethod(lambda _, grads=grads: tested.step(grads))

        class Reference:
            params, state_of = reference.params, reference.state_of
            step = staticmethod(lambda _, grads=grads: reference.step(grads))

        run_lockstep(Reference, Feed, [small], OPTIONS)
        for param, grad in zip(tested.params, grads):
            assert grad is None or torch.equal(param.grad, grad), number


def test_grad_scale_is_divided_out_before_clipping():
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    assert float(clipping_scale(grads, None, 1.0)) == pytest.approx(13.0)
    assert float(clipping_scale(grads, None, 26.0)) == 1.0
    assert float(clipping_scale(grads, torch.tensor(2.0), 1.0)) == pytest.approx(13.0)
    assert float(clipping_scale(grads, torch.tensor(2.0), 13.0)) == 2.0


def test_an_unusable_gradient_has_no_part_in_the_norm():
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([float("nan")]), torch.tensor([float("inf")])]
    assert float(clipping_scale(grads, None, 1.0)) == pytest.approx(5.0)


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 0.0), ("max_grad_norm", -1.0), ("precision", "medium")])
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        SoapRun(random_params([(2, 2)]), **{name: value})
