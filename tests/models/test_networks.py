"""What every network promises, whatever its kind."""

import copy
import inspect

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmf_fast.forward.dual import Dual
from mmf_fast.models import NETWORKS, build
from mmf_fast.models.layers import sinusoids

SMALL = {
    "mlp": dict(name="mlp", dim=3, width=17, depth=2, num_classes=4),
    "dit": dict(name="dit", input_size=6, channels=2, patch_size=3, width=24, depth=2, heads=3, num_classes=4),
    "sequence": dict(
        name="dit", dims=1, input_size=6, channels=2, patch_size=3, width=18, depth=2, heads=3, num_classes=4
    ),
    "unet": dict(
        name="unet", input_size=6, channels=2, base_channels=8, channel_mults=(1, 3), blocks=1,
        attention_resolutions=(3,), heads=2, num_classes=4,
    ),
}  # fmt: skip
every_network = pytest.mark.parametrize("name", SMALL)


def network(name, awake=True, **changes):
    """A small network; `awake` moves it off its initial u = 0, as a few steps of training would."""
    torch.manual_seed(0)
    net = build(**{**SMALL[name], **changes})
    if awake:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def inputs(net, batch=3, dtype=torch.float32):
    """z, r, t, y with 0 <= r <= t <= 1, and the context of a network that takes one."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, *net.shape, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.linspace(0.3, 1, batch, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    y = torch.randint(0, net.num_classes, (batch,), generator=generator) if net.num_classes else None
    length = net.conditioning.context_dim
    context = (torch.randn(batch, length, generator=generator, dtype=torch.float64).to(dtype),) if length else ()
    return z, t * torch.linspace(0, 1, batch, dtype=t.dtype), t, y, *context


@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_output_is_shaped_and_typed_like_the_sample(name, dtype):
    net = network(name).to(dtype)
    z, r, t, y = inputs(net, dtype=dtype)
    u = net(z, r, t, y)
    assert u.shape == z.shape and u.dtype is dtype and u.isfinite().all()


@every_network
def test_a_bfloat16_network_takes_and_returns_float32_samples(name):
    net = network(name)
    z, r, t, y = inputs(net)
    u = net(z, r, t, y)
    rounded = net.bfloat16()(z, r, t, y)
    assert rounded.dtype is torch.float32
    assert (rounded - u).norm() < 0.03 * u.norm()


@every_network
@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast_keeps_the_dtype_of_the_sample(name, qk_norm):
    net = network(name, **({"qk_norm": True} if qk_norm and SMALL[name]["name"] == "dit" else {}))
    z, r, t, y = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        u = net(z, r, t, y)
    assert u.dtype is torch.float32
    assert (u - net(z, r, t, y)).norm() < 0.03 * u.norm()


@every_network
def test_the_network_starts_at_zero_and_every_parameter_learns(name):
    net = network(name, awake=False)
    z, r, t, y = inputs(net)
    assert net(z, r, t, y).count_nonzero() == 0
    net = network(name)
    net(z, r, t, y).pow(2).sum().backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert not still


@every_network
def test_every_argument_matters(name):
    net = network(name)
    z, r, t, y = inputs(net)
    u = net(z, r, t, y)
    changed = {
        "z": net(z + 0.1, r, t, y),
        "r": net(z, 0.5 * r + 0.01, t, y),
        "t": net(z, r, 0.9 * t + 0.05, y),
        "time at the same interval": net(z, r + 0.1, t + 0.1, y),
        "y": net(z, r, t, (y + 1) % net.num_classes),
    }
    for argument, other in changed.items():
        per_sample = (other - u).flatten(1).norm(dim=1)
        assert (per_sample > 1e-4 * u.norm()).all(), argument


@every_network
def test_samples_of_a_batch_do_not_mix(name):
    net = network(name).double()
    z, r, t, y = inputs(net, dtype=torch.float64)
    u = net(z, r, t, y)
    for i in range(len(z)):
        one = slice(i, i + 1)
        torch.testing.assert_close(net(z[one], r[one], t[one], y[one]), u[one], rtol=1e-10, atol=1e-12)


@every_network
def test_no_labels_mean_null_labels(name):
    net = network(name)
    z, r, t, y = inputs(net)
    assert net(z, r, t).equal(net(z, r, t, torch.full_like(y, net.num_classes)))
    assert not net(z, r, t).equal(net(z, r, t, y))


@every_network
def test_an_unconditional_network_refuses_labels(name):
    net = network(name, num_classes=0)
    z, r, t, _ = inputs(net)
    assert net(z, r, t).shape == z.shape
    with pytest.raises(ValueError, match="pass y=None"):
        net(z, r, t, torch.zeros(len(z), dtype=torch.long))


@every_network
def test_a_sample_of_another_shape_is_refused(name):
    net = network(name)
    z, r, t, y = inputs(net)
    with pytest.raises(ValueError, match="built for samples of shape"):
        net(torch.cat((z, z), dim=1), r, t, y)


@every_network
def test_a_context_matters_and_is_differentiated_with_the_rest(name):
    net = network(name, context_dim=5).double()
    z, r, t, y, context = inputs(net, dtype=torch.float64)
    w = torch.randn_like(z)
    moving = net(Dual(z, w), r, Dual(t, torch.ones_like(t)), y, context=context)
    u, du = moving.primal, moving.tangent
    torch.testing.assert_close(u, net(z, r, t, y, context), rtol=1e-12, atol=1e-12)
    h = 1e-5
    difference = (net(z + h * w, r, t + h, y, context) - net(z - h * w, r, t - h, y, context)) / (2 * h)
    assert (du - difference).norm() < 1e-7 * difference.norm()
    changed = net(z, r, t, y, context=context + 0.1) - u
    assert (changed.flatten(1).norm(dim=1) > 1e-4 * u.norm()).all()
    u.sum().backward()
    assert all(p.grad.count_nonzero() for p in net.conditioning.context.parameters())


@every_network
def test_a_context_is_needed_where_the_network_has_one_and_nowhere_else(name):
    net = network(name, context_dim=5)
    z, r, t, y, context = inputs(net)
    with pytest.raises(ValueError, match=r"takes context=, of shape \(B, 5\); it was given none"):
        net(z, r, t, y)
    with pytest.raises(ValueError, match=r"takes context=, of shape \(B, 5\); it was given \(3, 4\)"):
        net(z, r, t, y, context[:, :4])
    with pytest.raises(ValueError, match="without context was given one; build it with context_dim"):
        network(name)(z, r, t, y, context)


@every_network
def test_the_time_derivative_is_finite_and_modest(name):
    """Central differences of two step sizes agree (u is smooth at that scale) and |d_t u| stays within 16 |u|."""
    net = network(name).double()
    z, r, t, y = inputs(net, batch=16, dtype=torch.float64)

    def derivative(h):
        return (net(z, r, t + h, y) - net(z, r, t - h, y)) / (2 * h)

    coarse, fine = derivative(1e-2), derivative(1e-5)
    assert fine.isfinite().all()
    assert fine.norm() < 16 * net(z, r, t, y).norm()
    assert (coarse - fine).norm() < 0.05 * fine.norm()


@pytest.mark.parametrize(
    "config",
    [
        *SMALL.values(),
        dict(name="mlp", dim=1, width=5, depth=1),
        dict(name="dit", input_size=9, channels=1, patch_size=1, width=20, depth=1, heads=5, mlp_ratio=2.7),
        dict(name="dit", input_size=7, channels=3, patch_size=7, width=16, depth=3, heads=1, qk_norm=True, dropout=0.2),
        dict(name="dit", dims=1, input_size=8, channels=5, patch_size=2, width=6, depth=1, heads=1, context_dim=3),
        dict(name="mlp", context_dim=2),
        dict(name="unet", input_size=5, base_channels=12, channel_mults=(2,), attention_resolutions=(), dropout=0.2),
        dict(name="unet", input_size=12, base_channels=4, channel_mults=(1, 2, 3), blocks=2,
             attention_resolutions=(12, 3), heads=1, num_classes=2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 3])
def test_flops_equal_those_that_torch_counts(config, batch):
    net = build(**config)
    # The math kernel, because torch counts no FLOPs for the fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(*inputs(net, batch))
    assert net.flops(batch) == counter.get_total_flops()
    assert net.flops() * batch == net.flops(batch)


@every_network
def test_the_network_compiles_in_one_graph(name):
    net = network(name)
    z, r, t, y = inputs(net)
    expected = net(z, r, t, y)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, r, t, y), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(z, r, t), net(z, r, t), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@every_network
def test_the_config_rebuilds_the_network(name):
    net = network(name)
    assert set(net.config) == {"name", *inspect.signature(NETWORKS[net.config["name"]]).parameters}
    again = build(**copy.deepcopy(net.config))
    assert again.config == net.config
    again.load_state_dict(net.state_dict())
    assert again(*inputs(net)).equal(net(*inputs(net)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="dti"), "unknown model 'dti'; did you mean 'dit'"),
        (dict(name="transformer"), "unknown model 'transformer'; valid are mlp, dit, unet"),
        (dict(name="mlp", widht=3), "model 'mlp' has no argument 'widht'; did you mean 'width'"),
        (dict(name="dit"), "model 'dit' needs the argument 'input_size'"),
        (dict(name="mlp", depth=0), "depth must be at least 1, got 0"),
        (dict(name="mlp", num_classes=-2), "num_classes must be 0"),
        (dict(name="dit", input_size=9, patch_size=2), "input_size 9 is not divisible by patch_size 2"),
        (dict(name="dit", input_size=8, width=20, heads=3), "width 20 is not divisible by heads 3"),
        (dict(name="dit", input_size=8, width=18, heads=3), "width 18 is not divisible by 4"),
        (dict(name="dit", input_size=8, dims=1, width=9, heads=3), "width 9 is not divisible by 2"),
        (dict(name="dit", input_size=8, dims=3), "dims is 3: 2 for square images, 1 for sequences"),
        (dict(name="dit", input_size=8, context_dim=-1), "context_dim must be 0"),
        (dict(name="dit", input_size=8, mlp_ratio=0.0), "mlp_width must be at least 1"),
        (dict(name="unet", input_size=12), "input_size 12 is not divisible by 8, which 4 levels need"),
        (dict(name="unet", input_size=8), r"attention resolution 16 never occurs; this network has \[8, 4, 2, 1\]"),
        (dict(name="unet", input_size=16, base_channels=30), "base_channels 30 is not a positive multiple of 4"),
        (dict(name="unet", input_size=16, channel_mults=()), "levels must be at least 1"),
        (dict(name="unet", input_size=16, channel_mults=(1, 0)), "channel_mults must be at least 1"),
        (dict(name="unet", input_size=16, heads=3), "width 128 is not divisible by heads 3"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_one_line_errors(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build(**arguments)
    assert "\n" not in str(error.value)


@every_network
def test_the_primal_of_a_dual_call_is_the_plain_call(name):
    net = network(name).double()
    z, r, t, y = inputs(net, dtype=torch.float64)
    w = torch.randn_like(z)
    moving = net(Dual(z, w), r, Dual(t, torch.ones_like(t)), y)
    u, du = moving.primal, moving.tangent
    torch.testing.assert_close(u, net(z, r, t, y), rtol=1e-12, atol=1e-12)  # another kernel may round otherwise
    h = 1e-5
    difference = (net(z + h * w, r, t + h, y) - net(z - h * w, r, t - h, y)) / (2 * h)
    assert (du - difference).norm() < 1e-7 * difference.norm()


@every_network
def test_a_dual_call_compiles_in_one_graph(name, float64):
    net = network(name)
    z, r, t, y = inputs(net)

    def velocity_and_derivative(z, w, r, t, y):
        moving = net(Dual(z, w), r, Dual(t, torch.ones_like(t)), y)
        return moving.primal, moving.tangent

    compiled = torch.compile(velocity_and_derivative, fullgraph=True, backend="eager")
    w = torch.randn_like(z)
    torch.testing.assert_close(compiled(z, w, r, t, y), velocity_and_derivative(z, w, r, t, y))
    torch.compiler.reset()


def test_the_tangent_of_the_time_embedding_is_float32_in_a_bfloat16_network():
    t = torch.rand(4, dtype=torch.bfloat16)
    embedded = sinusoids(Dual(t, torch.ones_like(t)), 8)
    assert embedded.primal.dtype is torch.float32 and embedded.tangent.dtype is torch.float32
    frequencies = 2 ** torch.linspace(0, 1, 8)
    sin, cos = sinusoids(t, 8).chunk(2, dim=-1)
    expected = torch.cat((frequencies * cos, -frequencies * sin), dim=-1)
    torch.testing.assert_close(embedded.tangent, expected)
