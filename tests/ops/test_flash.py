"""Which FlashAttention is chosen and put in place, with stand-ins for the GPU and for the packages."""

import importlib.machinery
import math

import pytest
import torch
import torch.distributed.tensor  # it registers rules for the operators that a test replaces, whenever it is imported
from torch.nn import attention

from mmf_fast.ops import attention as operator
from mmf_fast.ops import flash

CUDA = torch.device("cuda")
FIRST = {"cudnn": int(attention.SDPBackend.CUDNN_ATTENTION)}
FLASH = int(attention.SDPBackend.FLASH_ATTENTION)


class Machine:
    """A GPU that is not there, with packages that are not installed; PyTorch's registry is the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.modules, self.broken, self.cudnn, self.own = (9, 0), set(), set(), True, True
        patch = monkeypatch.setattr
        patch(torch.cuda, "get_device_capability", lambda *_: self.capability)
        patch(torch.backends.cudnn, "is_available", lambda: self.cudnn)
        patch(torch.backends.cuda, "is_flash_attention_available", lambda: self.own)
        patch(flash, "_serving", None)
        patch(flash.importlib.util, "find_spec", self.find_spec)
        patch(attention._registry, "_FLASH_ATTENTION_IMPLS", {kind: self.register(kind) for kind in ("FA3", "FA4")})

    def find_spec(self, name: str) -> importlib.machinery.ModuleSpec:
        if name not in self.modules:
            raise ModuleNotFoundError(name)
        return importlib.machinery.ModuleSpec(name, None)

    def register(self, kind: str):  # what PyTorch calls when the implementation is activated
        def enter() -> "Machine":
            if kind in self.broken:
                raise RuntimeError("undefined symbol:\n_ZN3c10")
            return self

        return enter

    def remove(self) -> None: ...

    def chosen(self) -> str:
        flash._serving = None
        return flash.activate(CUDA).kind


@pytest.fixture
def machine(monkeypatch):
    order = torch._C._get_sdp_priority_order()
    monkeypatch.delenv("MMF_FAST_FLASH", raising=False)
    yield Machine(monkeypatch)
    attention.restore_flash_attention_impl(_raise_warn=False)
    torch._C._set_sdp_priority_order(order)


BOTH = {"flash_attn_interface", "flash_attn.cute.interface"}


@pytest.mark.parametrize(
    ("capability", "modules", "expected"),
    [
        ((9, 0), BOTH, "FA3"), ((9, 0), {"flash_attn.cute.interface"}, "FA4"), ((9, 0), set(), "cudnn"),
        ((10, 0), BOTH, "FA4"), ((10, 0), set(), "cudnn"), ((8, 0), BOTH, "FA2"), ((12, 0), BOTH, "FA2"),
        ((7, 5), BOTH, "none"),
    ],
)  # fmt: skip
def test_the_best_that_is_installed_for_the_chip_serves(machine, capability, modules, expected):
    machine.capability, machine.modules = capability, modules
    assert machine.chosen() == expected
    registered = expected if expected in ("FA3", "FA4") else None
    assert attention.current_flash_attention_impl() == registered
    if expected != "none":
        assert flash.serving() == expected
        assert torch._C._get_sdp_priority_order()[0] == FIRST.get(expected, FLASH)


def test_the_reason_says_what_was_passed_over(machine):
    machine.cudnn = False
    kind, reason = flash.activate(CUDA)
    assert kind == "FA2"
    assert reason == (
        "FA3: flash_attn_interface is not installed; FA4: flash_attn.cute.interface is not installed; "
        "cudnn: this torch has no cuDNN"
    )
    machine.own = False
    assert machine.chosen() == "none"


def test_a_package_that_does_not_load_is_passed_over_and_named(machine):
    machine.modules, machine.broken = BOTH, {"FA3"}
    assert flash.activate(CUDA) == ("FA4", "FA3: it does not load (undefined symbol: _ZN3c10)")


@pytest.mark.parametrize("kind", flash.KINDS)
def test_the_environment_forces_one(machine, monkeypatch, kind):
    machine.modules = BOTH
    monkeypatch.setenv("MMF_FAST_FLASH", kind)
    assert flash.activate(CUDA) == (kind, "MMF_FAST_FLASH") and flash.serving() == kind
    for other in flash.KINDS:  # and another one later
        monkeypatch.setenv("MMF_FAST_FLASH", other)
        assert flash.activate(CUDA).kind == other == flash.serving()


def test_what_cannot_be_forced_is_refused_in_a_line(machine, monkeypatch):
    monkeypatch.setenv("MMF_FAST_FLASH", "FA3")
    with pytest.raises(ValueError, match="MMF_FAST_FLASH=FA3 cannot serve here, FA3: flash_attn_interface is not inst"):
        flash.activate(CUDA)
    monkeypatch.setenv("MMF_FAST_FLASH", "fa9")
    with pytest.raises(ValueError, match="MMF_FAST_FLASH is 'fa9': choose one of FA3, FA4, cudnn, FA2"):
        flash.activate(torch.device("cpu"))


def test_what_the_program_has_activated_itself_stays(machine):
    attention.activate_flash_attention_impl("FA4")
    machine.modules = BOTH
    assert flash.activate(CUDA) == ("FA4", "this program has activated it in PyTorch")


def test_other_devices_have_none(machine):
    assert flash.activate(torch.device("cpu")) is None and flash.serving() == "FA2"


@pytest.mark.parametrize("kind", ["cudnn", "FA2"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_backward_pass_at_lambda_0_is_the_chosen_ones(machine, monkeypatch, kind, rows):
    """Stand-ins compute the gradients from what they are given, O and LSE among it."""
    called = []

    def stand_in(name):
        def backward(g, q, k, v, o, lse, *rest, scale):
            called.append(name)
            causal = rest[-1] if name == "cudnn" else rest[-3]
            assert lse.shape == ((*q.shape[:3], 1) if name == "cudnn" else q.shape[:3]) and causal is False
            p = torch.exp(scale * q @ k.mT - lse.reshape(*q.shape[:3], 1))
            d = p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
            return scale * d @ k, scale * d.mT @ q, p.mT @ g

        return backward

    for name in ("cudnn", "flash"):
        monkeypatch.setattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention_backward", stand_in(name))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # as conftest.py sets them
    monkeypatch.setenv("MMF_FAST_FLASH", kind)
    flash.activate(CUDA)
    q, k, v, g = (torch.randn(2, 3, rows, 16, dtype=torch.float64, requires_grad=True) for _ in range(4))
    logits = q @ k.mT / 4
    o = torch.softmax(logits, -1) @ v
    found = operator._flash_backward(g, q, k, v, o, torch.logsumexp(logits, -1), False, 1 / math.sqrt(16))
    expected = torch.autograd.grad(o, (q, k, v), g)
    assert called == ["cudnn" if kind == "cudnn" and rows > 1 else "flash"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
