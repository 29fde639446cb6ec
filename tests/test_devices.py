import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmf_fast.devices import PEAK_FLOPS, choose_device, peak_flops


@pytest.mark.parametrize(
    ("driver", "known_as"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),  # has "H200" in it
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("B200", "B200"),
    ],
)
def test_the_names_of_drivers(driver: str, known_as: str) -> None:
    for precision in ("bf16", "tf32", "fp32"):
        assert peak_flops(driver, precision) == PEAK_FLOPS[known_as][precision]


@pytest.mark.parametrize("unknown", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090", "NVIDIA A10", ""])
def test_what_is_not_known_has_no_peak(unknown: str) -> None:
    assert peak_flops(unknown, "bf16") is None


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_published_figures() -> None:
    """Dense tensor-core FLOP/s = cores x FLOPs per clock and core x boost clock, from NVIDIA's architecture papers:

    A100: 432 tensor cores, 512 bf16 FLOPs a clock each, 1.41 GHz;  H100 SXM: 528, 1024, 1.83 GHz (tensor boost).
    fp32: 2 FLOPs a clock on 6912 cores at 1.41 GHz, and on 16896 cores at 1.98 GHz.
    """
    assert peak_flops("A100", "bf16") == pytest.approx(432 * 512 * 1.41e9, rel=0.01)
    assert peak_flops("H100", "bf16") == pytest.approx(528 * 1024 * 1.83e9, rel=0.01)
    assert peak_flops("A100", "fp32") == pytest.approx(2 * 6912 * 1.41e9, rel=0.01)
    assert peak_flops("H100", "fp32") == pytest.approx(2 * 16896 * 1.98e9, rel=0.01)
    for name, peaks in PEAK_FLOPS.items():
        assert peaks["bf16"] == pytest.approx(2 * peaks["tf32"], rel=0.03), name  # half the operands in a clock


def test_a_device_without_content_is_refused() -> None:
    line = r"device 'meta' cannot be used here \(tensors there have no content\): choose auto, or one that is there"
    with pytest.raises(ValueError, match=line):
        choose_device("meta")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_chosen_with_its_index(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device refuses a device without one. Fake tensors stand for those of a GPU."""
    activated: list[torch.device] = []
    monkeypatch.setattr("mmf_fast.devices.flash.activate", activated.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with FakeTensorMode():
        assert choose_device(name) == torch.device("cuda", 0)
    assert activated == [torch.device("cuda", 0)]


def test_a_cpu_is_chosen_as_it_is_called() -> None:
    assert choose_device("cpu") == torch.device("cpu")
