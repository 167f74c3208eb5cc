"""class SOAP: arguments and groups."""

import copy
import inspect
import warnings

import pytest
import torch
from comparison import AVAILABLE, SoapRun, random_gradients, random_params
from small_model import assert_same, assert_unchanged, model_of, snapshot, train
from torch import nn

from soap_opt import SOAP


def test_signature():
    """torch.optim.Adam's positional order, everything else keyword-only, the original's defaults."""
    parameters = inspect.signature(SOAP).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["params", "lr", "betas", "eps", "weight_decay"]
    assert positional == list(inspect.signature(torch.optim.Adam).parameters)[:5]
    named = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert named == {
        "shampoo_beta": None,
        "precondition_frequency": 10,
        "max_precond_dim": 10000,
        "merge_dims": False,
        "precondition_1d": False,
        "normalize_grads": False,
        "data_format": "channels_first",
        "correct_bias": True,
        "refresh": "staggered",
        "refresh_tolerance": 0.01,
        "refresh_start": 0,
        "maximize": False,
        "max_grad_norm": None,
        "precision": "highest",
        "overlap_refresh": True,
        "scratch_limit": 2**31,
        "capturable": False,
        "foreach": None,
        "fused": None,
    }
    defaults = {n: parameters[n].default for n in positional[1:]}
    assert defaults == {"lr": 3e-3, "betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": 0.01}


def test_one_line_replaces_adam():
    """The same call as torch.optim.Adam's, by position and by name."""
    model = model_of()
    by_name = SOAP(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-9, weight_decay=0.1)
    by_position = SOAP(model.parameters(), 1e-3, (0.9, 0.999), 1e-9, 0.1)
    assert by_name.defaults == by_position.defaults
    train(model, by_name)


def test_a_group_that_cannot_be_fused_leaves_nothing_behind():
    optimizer = SOAP([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(RuntimeError, match="fused=True cannot be met"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, device="meta"))], "fused": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, "Invalid learning rate: -1"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1"),
        ({"lr": torch.tensor(float("nan"))}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError, "Tensor lr must be 1-element"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
        ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
        ({"shampoo_beta": 1.5}, ValueError, "Invalid shampoo_beta value: 1.5"),
        ({"scratch_limit": -1}, ValueError, "Invalid scratch_limit value: -1"),
        ({"precondition_frequency": 0}, ValueError, "Invalid precondition_frequency value: 0"),
        ({"precondition_frequency": 2.5}, ValueError, "Invalid precondition_frequency value: 2.5"),
        ({"precondition_frequency": 2.0}, ValueError, "Invalid precondition_frequency value: 2.0"),
        ({"precondition_frequency": float("inf")}, ValueError, "Invalid precondition_frequency value: inf"),
        ({"precondition_frequency": True}, ValueError, "Invalid precondition_frequency value: True"),
        ({"max_precond_dim": "big"}, ValueError, "Invalid max_precond_dim value: big"),
        ({"max_precond_dim": -1}, ValueError, "Invalid max_precond_dim value: -1"),
        ({"data_format": "nhwc"}, ValueError, "Invalid data_format: 'nhwc'"),
        ({"refresh": "sometimes"}, ValueError, "Invalid refresh policy: 'sometimes'"),
        ({"refresh_start": -1}, ValueError, "Invalid refresh_start value: -1"),
        ({"refresh_tolerance": -0.1}, ValueError, "Invalid refresh_tolerance value: -0.1"),
        ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"amsgrad": True}, TypeError, "amsgrad=True: .*eigenbases"),
        ({"differentiable": True}, TypeError, "differentiable=True: .*derivative"),
        ({"decoupled_weight_decay": True}, TypeError, "decoupled_weight_decay=True: weight decay is always decoupled"),
        ({"momentum": 0.9}, TypeError, "unexpected keyword argument 'momentum'"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        SOAP([nn.Parameter(torch.ones(2, 2))], **options)
    if error is ValueError:  # the same checks for a group, and nothing of it stays behind
        optimizer = SOAP([nn.Parameter(torch.ones(2, 2))])
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"eps": -1}, "Invalid epsilon value: -1"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
)
def test_messages_are_torch_s(options, message):
    for optimizer in (SOAP, torch.optim.Adam):
        with pytest.raises(ValueError, match=message):
            optimizer([nn.Parameter(torch.ones(2, 2))], **options)


def test_adam_s_arguments_that_are_off_are_accepted():
    SOAP([nn.Parameter(torch.ones(2, 2))], amsgrad=False, differentiable=False, maximize=False)


def test_complex_parameters_are_refused():
    with pytest.raises(RuntimeError, match="complex parameters, but parameter 1 .* is torch.complex64"):
        SOAP([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


def test_sparse_gradients_are_refused_and_nothing_changes():
    dense = nn.Parameter(torch.ones(3, 2))
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = SOAP([{"params": [("dense", dense)]}, {"params": [("table", embedding.weight)]}])
    before = snapshot(optimizer)
    dense.grad = torch.ones(3, 2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients, but that of parameter 1 \(table\) of shape \(4, 3\)"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_an_empty_parameter_list_is_torch_s_error():
    with pytest.raises(ValueError, match="empty parameter list"):
        SOAP([])
    with pytest.raises(TypeError, match="params argument given to the optimizer"):
        SOAP(torch.ones(2))
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        SOAP([torch.ones(2, requires_grad=True) * 2])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        SOAP([1.0])


def test_generators_groups_and_names():
    model = model_of()
    reference = train(model_of(), SOAP(list(model_of().parameters())), 0)
    assert_same(reference, model.parameters())
    results = []
    for make in (
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}],
        lambda m: [{"params": m[0].named_parameters()}, {"params": m[2].named_parameters()}],
    ):
        model = model_of()
        results.append(train(model, SOAP(make(model), refresh="together", precondition_frequency=2), 6))
    for other in results[1:]:
        assert_same(results[0], other)
    assert SOAP(model.named_parameters()).param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="some parameters appear in more than one|duplicate|more than one"):
        SOAP([{"params": [model[0].weight]}, {"params": [model[0].weight]}])


def test_groups_have_their_own_options():
    """Each group runs as an optimizer of its own would."""
    shapes, options = [(4, 3), (5, 5)], [{"lr": 0.1, "betas": (0.9, 0.9)}, {"weight_decay": 0.5, "max_precond_dim": 0}]
    params = random_params(shapes)
    together = [nn.Parameter(p.clone()) for p in params]
    optimizer = SOAP([{"params": [p], **o} for p, o in zip(together, options)], refresh="together", precondition_frequency=2)
    apart = [SoapRun([p], refresh="together", precondition_frequency=2, **o) for p, o in zip(params, options)]
    for grads in random_gradients(shapes, 6):
        for p, run, grad in zip(together, apart, grads):
            p.grad = grad.clone()
            run.step([grad])
        optimizer.step()
    for p, run in zip(together, apart):
        assert torch.equal(p, run.params[0])


def test_an_empty_group_and_a_group_without_gradients():
    model = model_of()
    optimizer = SOAP([{"params": []}, {"params": model.parameters()}, {"params": [nn.Parameter(torch.ones(2, 2))]}])
    train(model, optimizer)
    assert len(optimizer.state) == 4
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before)


def test_parameters_that_require_no_gradient_are_left_alone():
    model = model_of()
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.clone()
    optimizer = SOAP(model.parameters())
    train(model, optimizer)
    assert torch.equal(model[0].weight, kept)
    assert model[0].weight not in optimizer.state
    with pytest.raises(KeyError):
        optimizer.state_dict()["state"][0]


def test_zero_size_and_scalar_parameters():
    shapes = [(0,), (0, 3), (3, 0, 2), (), (1,), (1, 1, 1, 1, 1)]
    for flags in AVAILABLE:
        for options in ({}, {"merge_dims": True}, {"precondition_1d": True}):
            run = SoapRun(random_params(shapes), **flags, precondition_frequency=1, **options)
            for grads in random_gradients(shapes, 5):
                run.step(grads)
            for i, shape in enumerate(shapes):
                assert not any(key.startswith("gram_") for key in run.state_of(i)), (shape, options)
            assert float(run.state_of(3)["step"]) == 4
    copy.deepcopy(run.optimizer).load_state_dict(run.optimizer.state_dict())


def test_tied_parameters_count_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    optimizer = SOAP(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 2
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert float(optimizer.state[layer.weight]["step"]) == 2


def test_a_warning_for_a_long_first_step():
    """merge_dims=True can make one: a (90, 90) weight gets an 8100 x 8100 Gram. A LoRA pair of width 4096 has two of those."""
    weight = nn.Parameter(torch.zeros(90, 90))
    message = r"will take about \d+ s on this machine.*8100 x 8100 matrix for parameter 0 of shape \(90, 90\).*merge_dims=False"
    with pytest.warns(UserWarning, match=message) as caught:
        SOAP([weight], merge_dims=True)
    assert caught[0].filename == __file__  # it points at the caller's line
    with pytest.warns(UserWarning, match=r"parameter 1 \(wide\) of shape \(9000, 2\)"):
        SOAP([("small", nn.Parameter(torch.zeros(2, 2))), ("wide", nn.Parameter(torch.zeros(9000, 2)))])
    with pytest.warns(UserWarning, match=r"of 2 Grams"):
        SOAP([nn.Parameter(torch.zeros(8192, 1)), nn.Parameter(torch.zeros(1, 8192))])
    with pytest.warns(UserWarning, match="will take about") as caught:  # once, when the groups together take so long
        SOAP([{"params": [nn.Parameter(torch.zeros(6000, 1))]} for _ in range(6)])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SOAP([weight])
        with pytest.raises(UserWarning, match="will take about"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(9000, 1))]})
        assert len(optimizer.param_groups) == 1  # a warning may be an exception: nothing is half done
        SOAP([weight])
        SOAP([nn.Parameter(torch.zeros(1000, 2))])
        SOAP([nn.Parameter(torch.zeros(9000, 2))], max_precond_dim=4096)
        SOAP([nn.Parameter(torch.zeros(9000))])
