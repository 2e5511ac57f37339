"""A sample of the zoo: half of all free groups at once, on networks that nobody here wrote."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo.halves import measure
from zoo.networks import torchvision_entry
from zoo.reference import Reference, fresh, run, verdict

SAMPLE = {  # and how much of each may change at least
    "resnet18": 0.99,
    "mobilenet_v2": 0.99,
    "shufflenet_v2_x0_5": 0.98,
    "densenet121": 0.99,
    "convnext_tiny": 0.99,
    "swin_t": 0.99,
    "vit_b_32": 0.99,
    "lraspp_mobilenet_v3_large": 0.99,
}


@pytest.fixture(autouse=True)
def double(device: torch.device) -> None:
    if device.type == "mps":
        pytest.skip("has no double precision")


@pytest.mark.parametrize("name", SAMPLE)
def test_half_of_all_groups_at_once_equals_the_zeroed_network(
    name: str, device: torch.device
) -> None:
    row = measure(torchvision_entry(name), device)
    assert row["outcome"] == (
        "norms" if name in ("convnext_tiny", "swin_t", "vit_b_32") else "exact"
    )
    assert row["refused"] == []
    assert row["free"] >= SAMPLE[name], row["locked"]
    assert row["left"] < 0.6


def layers(width: int, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), norm, nn.ReLU(), nn.Linear(width, 2)).double()


def cut(full: nn.Module, made: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Fill `made` with the first entries of each weight, and say which ones that leaves out."""
    gone = dict[str, torch.Tensor]()
    for (name, old), new in zip(full.state_dict().items(), made.state_dict().values(), strict=True):
        if old.ndim and old.shape != new.shape:
            new.copy_(old[tuple(slice(n) for n in new.shape)])
            gone[name] = torch.ones(old.shape, dtype=torch.bool)
            gone[name][tuple(slice(n) for n in new.shape)] = False
        else:
            new.copy_(old)
    return made, gone


@pytest.mark.parametrize(
    ("norm", "outcome"),
    [
        (nn.BatchNorm1d, "exact"),
        (nn.LayerNorm, "norms"),
        (nn.RMSNorm, "norms"),
        (lambda width: WrittenOut(width), "norms"),
        (lambda width: nn.GroupNorm(2, width), "norms"),
        (lambda width: nn.GroupNorm(width // 2, width), "exact"),  # whole groups are left out
    ],
)
def test_the_reference_tells_exact_from_exact_but_for_norms(
    norm: object, outcome: str, device: torch.device
) -> None:
    torch.manual_seed(3)
    full = layers(8, norm(8)).to(device)  # type: ignore[operator]
    example = torch.zeros(5, 3, dtype=torch.float64, device=device)
    if outcome == "norms" and isinstance(full[1], nn.GroupNorm):
        made, gone = halved_groups(full, device)
    else:
        made, gone = cut(full, layers(4, norm(4)).to(device))  # type: ignore[operator]
    assert verdict(full, made, gone, example)[0] == outcome


class WrittenOut(nn.LayerNorm):
    """A layer norm of single operators."""

    def __init__(self, width: int) -> None:
        super().__init__(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        apart = x - x.mean(-1, keepdim=True)
        spread = apart.pow(2).mean(-1, keepdim=True)
        return apart / (spread + self.eps).sqrt() * self.weight + self.bias


def halved_groups(full: nn.Sequential, device: torch.device) -> tuple[nn.Module, dict]:
    """Two channels of each of two groups of four."""
    made, gone, kept = layers(4, nn.GroupNorm(2, 4)).to(device), {}, [0, 1, 4, 5]
    for (name, old), new in zip(full.state_dict().items(), made.state_dict().values(), strict=True):
        for dim in [d for d in range(old.ndim) if old.shape[d] == 8]:
            new.copy_(old.index_select(dim, torch.tensor(kept, device=device)))
            mask = torch.ones(old.shape, dtype=torch.bool)
            gone[name] = mask.index_fill(dim, torch.tensor(kept), False)
        if name not in gone:
            new.copy_(old)
    return made, gone


def test_the_reference_sees_a_weight_that_is_off(device: torch.device) -> None:
    full = layers(8, nn.LayerNorm(8)).to(device)
    made, gone = cut(full, layers(4, nn.LayerNorm(4)).to(device))
    with torch.no_grad():
        made[3].weight[0, 0] *= 1 + 1e-6
    example = torch.zeros(5, 3, dtype=torch.float64, device=device)
    assert verdict(full, made, gone, example)[0] == "wrong"


class Experts(nn.Module):
    """A norm, and for each token the expert that the router likes best."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(3, width), nn.LayerNorm(width)
        self.router = nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(3, width, inner))
        self.down = nn.Parameter(torch.randn(3, inner, 2))

    def chosen(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.into(x))
        return x, self.router(x).argmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, chosen = self.chosen(x)
        order = chosen.argsort()
        ends = chosen.bincount(minlength=3).cumsum(0).to(torch.int32)
        inner = F.grouped_mm(x[order], self.up, offs=ends).relu()
        return F.grouped_mm(inner, self.down, offs=ends)[order.argsort()]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_the_reference_sends_each_token_to_its_expert_in_double(device: torch.device) -> None:
    torch.manual_seed(3)
    full = Experts(8, 12).to(device, torch.float64)
    example = torch.zeros(9, 3, dtype=torch.float64, device=device)
    with torch.no_grad():
        x, chosen = full.chosen(fresh(example))
        pairs = zip(x, chosen, strict=True)
        expected = [(token @ full.up[e]).relu() @ full.down[e] for token, e in pairs]
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(run(full, fresh(example), Reference()), [torch.stack(expected)])
    made, gone = cut(full, Experts(4, 6).to(device, torch.float64))
    assert verdict(copy.deepcopy(full), made, gone, example)[0] == "norms"
    with torch.no_grad():
        made.down[int(made.chosen(fresh(example))[1][0])] *= 1 + 1e-6
    assert verdict(full, made, gone, example)[0] == "wrong"
