"""Outlier statistics against their formulas on all values at once, and hooks that are gone afterwards."""

import csv
import math

import pytest
import torch
from torch import nn

from soap_opt.diagnostics import OutlierMeter
from soap_opt.diagnostics.outliers import BINS, Moments, channel_dim


def kurtosis(s):
    s = s.double()
    return float(s.pow(4).mean() / s.square().mean().square())


def by_formula(batches, dim):
    """The statistics of tensors that may differ in all sizes but that of dim."""
    columns = torch.cat([x.double().movedim(dim, 0).flatten(1) for x in batches], 1)  # [C, ...]
    values = columns.abs().flatten()
    median, sigma = float(values.quantile(0.5, interpolation="lower")), float(values.square().mean().sqrt())
    return {
        "kurtosis_channels": kurtosis(columns.square().mean(1).sqrt()),
        "kurtosis": kurtosis(columns),
        "max_over_median": float(values.max()) / median if median else math.inf,
        "beyond_6_sigma": float((values > 6 * sigma).double().mean()),
    }


def assert_agrees(row, batches, dim):
    want = by_formula(batches, dim)
    for name in ("kurtosis_channels", "kurtosis"):
        assert row[name] == pytest.approx(want[name], rel=1e-6), name  # (a convolution's sums differ from call to call)
    assert row["max_over_median"] == pytest.approx(want["max_over_median"], rel=0.008)
    values = torch.cat([x.double().abs().flatten() for x in batches])
    edge = 6 * float(values.square().mean().sqrt())
    near = float(((values > edge * 0.992) & (values < edge * 1.008)).double().mean())
    assert abs(row["beyond_6_sigma"] - want["beyond_6_sigma"]) <= near + 1e-12
    assert row["values"] == values.numel() and row["calls"] == len(batches) and row["not_finite"] == 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.up = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 6)
        self.last = nn.Conv1d(6, 4, 3)
        self.code = nn.Identity()

    def forward(self, x):
        y = self.conv(x)
        y = y * torch.exp(torch.arange(8.0)).view(8, 1, 1) * torch.randn_like(y).pow(3)  # outliers in channels and in values
        self.up(y)
        tokens = self.norm(y.flatten(2).mT)
        tokens = self.attention(tokens, tokens, tokens)[0]
        self.last(self.head(tokens).mT)
        return self.code(y)


CHANNELS = {"conv": 1, "up": 1, "norm": -1, "attention": -1, "head": -1, "last": 1, "code": 1}


def outputs_of(net, images, name):
    """Every output of one module, by a hook of the test's own."""
    seen = []
    handle = net.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())
    )
    torch.manual_seed(2)
    for x in images:
        net(x)
    handle.remove()
    return seen


@pytest.fixture
def images():
    torch.manual_seed(1)
    return [torch.rand(2, 3, 16, 20), torch.rand(1, 3, 32, 16), torch.rand(3, 3, 8, 8)]


def test_every_kind_of_layer_over_several_images(images):
    net = Net()
    with OutlierMeter(net, list(CHANNELS)) as meter:
        torch.manual_seed(2)
        for x in images:
            net(x)
    rows = {row["layer"]: row for row in meter.table()}
    assert list(rows) == list(CHANNELS)
    for name, dim in CHANNELS.items():
        assert_agrees(rows[name], outputs_of(net, images, name), dim)
    assert rows["code"]["kurtosis_channels"] > 5 and rows["code"]["beyond_6_sigma"] > 0  # the test has outliers to find


def test_the_default_layers():
    class GDN(nn.Module):
        def forward(self, x):
            return x

    net = nn.Sequential(nn.Conv2d(3, 4, 3), GDN(), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    with OutlierMeter(net) as meter:
        net(torch.rand(2, 3, 4, 4))
    assert [row["layer"] for row in meter.table()] == ["0", "1", "3", "5"]
    assert [row["type"] for row in meter.table()] == ["Conv2d", "GDN", "ConvTranspose2d", "Linear"]
    assert all(row["calls"] == 1 and row["kurtosis"] >= 1 for row in meter.table())


def test_a_predicate_and_inputs(images):
    net = Net()
    meter = OutlierMeter(net, lambda name, module: name.startswith("con"), inputs={"y": "up"}, outputs={"code": "code"})
    with meter:
        torch.manual_seed(2)
        for x in images:
            net(x)
    conv, code, y = meter.table()
    assert [row["layer"] for row in (conv, code, y)] == ["conv", "code", "y"] and y["type"] == "input of ConvTranspose2d"
    assert_agrees(y, outputs_of(net, images, "code"), 1)  # what goes into "up" is what comes out of "code"
    assert {key: value for key, value in y.items() if key not in ("layer", "type")} == {
        key: value for key, value in code.items() if key not in ("layer", "type")
    }


def test_inputs_by_keyword_and_outputs_in_dicts():
    class Inner(nn.Module):
        def forward(self, *, count, y):
            return {"n": count, "y": [2 * y]}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, y):
            return self.inner(count=torch.tensor(3), y=y)

    net, y = Outer(), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with OutlierMeter(net, ["inner"], inputs={"in": "inner"}) as meter:
        net(y)
    for row in meter.table():
        assert row["kurtosis"] == pytest.approx(kurtosis(y)) and row["values"] == 4
    assert meter.table()[0]["max_over_median"] == pytest.approx(2, rel=0.008)


def test_known_values():
    """Channels (3, 3) and (-4, 4): kurtosis (81 + 256) / 2 / (25 / 2)^2 of both kinds; one value of 100 among 99 ones."""
    moments = Moments()
    moments.add(torch.tensor([[3.0, -4.0], [3.0, 4.0]]), 1)
    row = moments.row()
    assert row["kurtosis_channels"] == row["kurtosis"] == pytest.approx(168.5 / 12.5**2)
    moments = Moments()
    moments.add(torch.cat([torch.ones(99), -torch.full((1,), 100.0)]), 0)
    row = moments.row()
    assert row["beyond_6_sigma"] == pytest.approx(0.01) and row["max_over_median"] == pytest.approx(100, rel=0.008)
    assert row["kurtosis"] == pytest.approx((99 + 1e8) / 100 / ((99 + 1e4) / 100) ** 2)


def test_normal_values_have_kurtosis_3():
    torch.manual_seed(0)
    moments = Moments()
    for _ in range(4):
        moments.add(torch.randn(50, 1000), 1)
    row = moments.row()
    assert row["kurtosis"] == pytest.approx(3, abs=0.05) and row["kurtosis_channels"] == pytest.approx(1, abs=0.02)
    assert row["beyond_6_sigma"] == 0


def test_within_a_bin_values_are_taken_as_even():
    """36,000 values of which 1,000 lie around 1, which is then 6 sigma: half of those are beyond it. Bins there are 0.4 and
    0.8 % wide, a tenth of their spread."""
    moments = Moments()
    moments.add(torch.cat([torch.zeros(35_000), torch.linspace(0.96, 1.04, 1000)]), 0)
    rms = math.sqrt(moments.squares / moments.count)
    want = float((torch.linspace(0.96, 1.04, 1000) > 6 * rms).double().sum()) / 36_000
    assert moments.row()["beyond_6_sigma"] == pytest.approx(want, rel=0.005)
    moments = Moments()
    moments.add(torch.linspace(0.9, 1.11, 100_001), 0)
    assert moments.row()["max_over_median"] == pytest.approx(1.11 / 1.005, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_cancels(scale, dtype):
    torch.manual_seed(0)
    x = torch.randn(8, 500, dtype=torch.float64).pow(3).to(dtype)
    one, other = Moments(), Moments()
    one.add(x, 1)
    other.add((x.double() * scale).to(dtype), 1)
    for name, value in one.row().items():
        assert other.row()[name] == pytest.approx(value, rel=0.02, abs=2e-3), name


def test_order_and_cuts_make_no_difference():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 7).pow(3)
    rows = []
    for parts in ([x], x.split(4), x.flip(0).split(5)):
        moments = Moments()
        for part in parts:
            moments.add(part, 1)
        rows.append(moments.row())
        assert int(moments.bins.sum()) == x.numel() and len(moments.bins) == BINS
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-12)


def test_inference_mode_before_and_after():
    net, x = nn.Linear(4, 3), torch.randn(50, 4)
    with OutlierMeter(net, [""]) as meter:
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                net(x)
    assert_agrees(meter.table()[0], [net(x).detach()] * 3, -1)
    assert meter.table()[0]["layer"] == "(model)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_outputs_are_only_read(dtype):
    x = torch.randn(3, 4).to(dtype)
    before, version = x.clone(), x._version
    Moments().add(x, 1)
    assert torch.equal(x, before) and x._version == version


def test_what_is_not_finite_is_left_out_and_counted():
    x = torch.randn(4, 300)
    holes = x.clone()
    holes[0], holes[1, 0] = math.nan, -math.inf
    with OutlierMeter(nn.Sequential(nn.Identity()), ["0"]) as meter:
        meter._wanted["0"][0](holes)
    (row,) = meter.table()
    assert row["not_finite"] == 301 and row["values"] == 899
    assert row["kurtosis"] == pytest.approx(kurtosis(holes[holes.isfinite()]))
    median = float(holes[holes.isfinite()].abs().median())
    assert row["max_over_median"] == pytest.approx(float(holes[holes.isfinite()].abs().max()) / median, rel=0.008)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 3), torch.ones(0, 3), torch.full((2, 3), math.nan), torch.ones(2, 3, dtype=torch.int64), None],
    ids=["zeros", "empty", "nan", "integers", "never"],
)
def test_degenerate_layers_are_nan(x):
    net = nn.Sequential(nn.Identity())
    with OutlierMeter(net, ["0"]) as meter:
        if x is not None:
            net(x)
    (row,) = meter.table()
    assert all(math.isnan(row[name]) for name in ("kurtosis_channels", "kurtosis", "max_over_median", "beyond_6_sigma"))


def test_degenerate_values_raise_nothing():
    net = nn.Sequential(nn.Identity())
    with OutlierMeter(net, ["0"]) as meter:
        for x in (torch.tensor(2.0), torch.ones(3), torch.ones(2, 5), torch.ones(1, 4, 2, 2), torch.zeros(2, 5)):
            net(x)
    (row,) = meter.table()
    assert row["values"] == 40 and math.isnan(row["kurtosis_channels"])  # of so many channels, and of as many others
    assert row["max_over_median"] == pytest.approx(2, rel=0.008)
    with OutlierMeter(net, ["0"]) as meter:
        net(torch.relu(torch.tensor([-1.0, -1.0, -1.0, 2.0])))
    assert meter.table()[0]["max_over_median"] == math.inf and meter.table()[0]["kurtosis"] == pytest.approx(4)


def test_the_model_is_as_it_was(images):
    net = Net()
    torch.manual_seed(2)
    plain = net(images[0])
    with pytest.raises(RuntimeError, match="on the way"), OutlierMeter(net, inputs={"y": "up"}) as meter:
        torch.manual_seed(2)
        watched = net(images[0])
        raise RuntimeError("on the way")
    assert torch.equal(plain, watched) and watched.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    net(images[1])
    # (attention multiplies with the weight of its out_proj and does not call it)
    assert {row["calls"] for row in meter.table() if row["layer"] != "attention.out_proj"} == {1}
    with meter:  # goes on
        net(images[1])
    assert {row["calls"] for row in meter.table() if row["layer"] != "attention.out_proj"} == {2}
    meter.reset()
    assert {row["calls"] for row in meter.table()} == {0}


def test_channel_dims_may_be_told():
    x = torch.randn(2, 4, 4, 6)  # channels last, as windowed attention hands them on
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 6))
    assert channel_dim(net[0], x) == 1 and channel_dim(net[1], x) == 3
    assert channel_dim(nn.Conv2d(3, 3, 3), x[0]) == 0  # without a batch
    with OutlierMeter(net, ["0"], channels=lambda module, x: -1) as meter:
        net(x)
    assert_agrees(meter.table()[0], [x], -1)


def test_table_and_csv(tmp_path, images):
    net = Net()
    with OutlierMeter(net) as meter:
        net(images[0])
    lines = str(meter).splitlines()
    assert lines[0].split() == list(meter.table()[0]) and lines[2].startswith("conv ")
    meter.table().to_csv(tmp_path / "outliers.csv")
    with open(tmp_path / "outliers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [row["layer"] for row in meter.table()]
    assert float(rows[0]["kurtosis"]) == meter.table()[0]["kurtosis"]


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([1, 2],), {}, TypeError, "model must be a torch.nn.Module, got list"),
        ((Net(), ["convolution"]), {}, ValueError, "the model has no module 'convolution'"),
        ((Net(),), {"inputs": {"y": "h_a"}}, ValueError, "the model has no module 'h_a'"),
        ((Net(),), {"inputs": {"conv": "up"}}, ValueError, "the label 'conv' comes twice"),
        ((nn.ReLU(),), {}, ValueError, "layers: nothing in ReLU is to be measured"),
    ],
)
def test_misuse(args, options, error, message):
    with pytest.raises(error, match=message):
        OutlierMeter(*args, **options)


@pytest.mark.slow
def test_latents_of_compressai_s_models():
    from compressai.entropy_models import EntropyBottleneck, GaussianConditional
    from compressai.models import Elic2022Chandelier, FactorizedPrior, MeanScaleHyperprior

    from soap_opt.integrations.compressai import latents

    assert latents(FactorizedPrior(8, 12)) == {"outputs": {"y": "g_a"}, "inputs": {}}
    net = MeanScaleHyperprior(8, 12).eval()
    assert latents(net) == {"outputs": {"y": "g_a"}, "inputs": {"z": "entropy_bottleneck"}}
    x = torch.rand(1, 3, 128, 64)
    with torch.no_grad(), OutlierMeter(net, **latents(net)) as meter:
        net(x)
        y = net.g_a(x)
    rows = {row["layer"]: row for row in meter.table()}
    assert {row["type"] for row in rows.values()} >= {"Conv2d", "ConvTranspose2d", "GDN", "input of EntropyBottleneck"}
    assert_agrees(rows["y"], [y, y], 1)
    assert rows["z"]["values"] == 8 * 2 * 1
    elic = latents(Elic2022Chandelier(N=8, M=20, groups=[1, 1, 2, 4, 12]))
    assert elic["outputs"] == {"y": "g_a"} and list(elic["inputs"]) == ["z"]

    class Other(nn.Module):  # one that does not speak CompressAI's vocabulary
        def __init__(self, *bottlenecks):
            super().__init__()
            self.coders = nn.ModuleList(bottlenecks)

    assert latents(Other(GaussianConditional(None), EntropyBottleneck(3)))["inputs"] == {"y": "coders.0", "z": "coders.1"}
    assert latents(Other(EntropyBottleneck(3)))["inputs"] == {"y": "coders.0"}
    twice = latents(Other(GaussianConditional(None), EntropyBottleneck(3), EntropyBottleneck(3)))["inputs"]
    assert twice == {"y": "coders.0", "z (coders.1)": "coders.1", "z (coders.2)": "coders.2"}
