"""Networks: their sizes, their shapes, and equality with references written another way."""

import copy

import pytest
import torch
from torch import nn

from structopt import networks

SIZES = {  # parameters, by hand
    networks.SimpleNet: (9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 16 + 1) * 10,
    networks.TeacherNet: 9 * (16 + 16 * 32 + 2 * 32 * 32 + 32 * 64 + 2 * 64 * 64)
    + 2 * (16 + 3 * 32 + 3 * 64)
    + 65 * 10,
    networks.StudentNet: 9 * (8 + 8 * 16 + 16 * 16) + 2 * (8 + 16 + 16) + 17 * 10,
    networks.LeNet300: 785 * 300 + 301 * 100 + 101 * 10,
    networks.LeNet5: 26 * 20 + 501 * 50 + 801 * 500 + 501 * 10,
    networks.ResNet20: 9 * (16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    + (16 * 32 + 32 * 64)  # shortcuts
    + 2 * (7 * 16 + 7 * 32 + 7 * 64)
    + 65 * 10,
    networks.TinyTransformer: 50 * 64  # patches
    + 64 * 18  # class token and positions
    + 3 * (65 * 192 + 65 * 64 + 65 * 128 + 129 * 64 + 4 * 64)
    + 2 * 64
    + 65 * 10,
}
PUBLISHED = {
    networks.SimpleNet: 29_066,
    networks.TeacherNet: 116_602,
    networks.StudentNet: 3_778,
    networks.LeNet300: 266_610,
    networks.LeNet5: 431_080,
    networks.ResNet20: 272_186,
    networks.TinyTransformer: 105_546,
}
ALL = pytest.mark.parametrize("network", SIZES, ids=lambda network: network.__name__)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def randomised(model: nn.Module) -> nn.Module:
    """Norms away from the identity, so that a norm left out is seen."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, std=0.1)
        elif tensor.ndim == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return model


@ALL
def test_parameters(network: type[nn.Module]) -> None:
    assert count(network()) == SIZES[network] == PUBLISHED[network]
    assert f"{PUBLISHED[network]:,}" in (network.__doc__ or "")


@ALL
def test_images_in_logits_out(network: type[nn.Module], device: torch.device) -> None:
    model = network(classes=7).to(device)
    logits = model(torch.randn(3, 1, 28, 28, device=device))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@ALL
def test_examples_do_not_see_each_other(network: type[nn.Module]) -> None:
    model = randomised(network()).eval().double()
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together)
    assert not torch.allclose(together[0], together[1])


@ALL
def test_a_copy_and_a_saved_state_are_the_same_function(network: type[nn.Module]) -> None:
    model = network().eval()
    other = network().eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    assert torch.equal(other(images), model(images))


@ALL
def test_can_be_traced(network: type[nn.Module]) -> None:
    """Folding and export work on the traced forms."""
    model = network().eval()
    images = torch.randn(2, 1, 28, 28)
    want = model(images)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), want)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), want)


@ALL
@pytest.mark.parametrize("shape", [(28, 28), (2, 3, 28, 28), (2, 1, 32, 32), (2, 784)])
def test_another_shape_is_named(network: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        network()(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "(batch, 1, 28, 28)" in str(error.value)


def test_a_single_image_gets_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"inputs\[None\]"):
        networks.SimpleNet()(torch.zeros(1, 28, 28))


@pytest.mark.parametrize(("parts", "named"), [({"patch": 5}, "patch=5"), ({"heads": 3}, "heads=3")])
def test_a_transformer_that_does_not_divide(parts: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        networks.TinyTransformer(**parts)


def test_widths() -> None:
    assert count(networks.SimpleNet(widths=(4, 8))) == 40 + 37 * 8 + 129 * 10
    assert count(networks.LeNet300(widths=(30, 10))) == 785 * 30 + 31 * 10 + 11 * 10
    assert count(networks.LeNet5(widths=(2, 5, 50))) == 26 * 2 + 51 * 5 + 81 * 50 + 51 * 10
    assert networks.ResNet20(width=4).fc.in_features == 16
    with pytest.raises(ValueError, match="unpack"):
        networks.SimpleNet(widths=(1, 2, 3))


def same(model: nn.Module, reference: nn.Sequential) -> None:
    """One function, the reference taking the model's parameters in order."""
    model, reference = randomised(model).double().eval(), reference.double().eval()
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    own = [t for t in reference.state_dict().values() if t.is_floating_point()]
    for mine, theirs in zip(own, tensors, strict=True):
        mine.copy_(theirs)
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    logits = reference(images)
    assert logits.std(dim=0).min() > 1e-4  # the images are told apart
    torch.testing.assert_close(model(images), logits)


def test_simple_net_is_this_sequence() -> None:
    same(
        networks.SimpleNet(),
        nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            *(nn.AvgPool2d(6), nn.Flatten(), nn.Linear(1024, 10)),
        ),
    )


def test_lenets_are_these_sequences() -> None:
    relu, pool, flat = nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    layers = (nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))
    same(networks.LeNet300(), nn.Sequential(flat, layers[0], relu, layers[1], relu, layers[2]))
    convolutions = (nn.Conv2d(1, 20, 5), pool, nn.Conv2d(20, 50, 5), pool)
    same(
        networks.LeNet5(),
        nn.Sequential(*convolutions, flat, nn.Linear(800, 500), relu, nn.Linear(500, 10)),
    )


def conv_norm(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def test_student_is_this_sequence() -> None:
    pool = nn.MaxPool2d(2)
    stem = (*conv_norm(1, 8), pool, *conv_norm(8, 16), pool, *conv_norm(16, 16))
    mean = nn.AdaptiveAvgPool2d(1)
    same(networks.StudentNet(), nn.Sequential(*stem, mean, nn.Flatten(), nn.Linear(16, 10)))


class Add(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def test_teacher_is_this_sequence() -> None:
    pool = nn.MaxPool2d(2)
    reference = nn.Sequential(
        *conv_norm(1, 16),
        *(*conv_norm(16, 32), pool, Add(*conv_norm(32, 32), *conv_norm(32, 32))),
        *(*conv_norm(32, 64), pool, Add(*conv_norm(64, 64), *conv_norm(64, 64))),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    same(networks.TeacherNet(), reference)


def test_resnet20_is_torchvisions_blocks() -> None:
    from torchvision.models.resnet import BasicBlock

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        shortcut = None
        if stride > 1:
            one = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            shortcut = nn.Sequential(one, nn.BatchNorm2d(outputs))
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return [first, BasicBlock(outputs, outputs), BasicBlock(outputs, outputs)]

    reference = nn.Sequential(
        *conv_norm(1, 16),
        *(*stage(16, 16, 1), *stage(16, 32, 2), *stage(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    same(networks.ResNet20(), reference)


def test_encoder_layer_is_torchs() -> None:
    mine = randomised(networks.EncoderLayer(dim=16, heads=4, hidden=24)).double().eval()
    torchs = nn.TransformerEncoderLayer(
        *(16, 4, 24), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    torchs = torchs.double().train()  # eval takes a fused path; without dropout both are equal
    attention = torchs.self_attn
    for theirs, name in (
        (attention.in_proj_weight, "qkv.weight"),
        (attention.in_proj_bias, "qkv.bias"),
        (attention.out_proj.weight, "proj.weight"),
        (attention.out_proj.bias, "proj.bias"),
        *((getattr(torchs, f"linear{i}").weight, f"fc{i}.weight") for i in (1, 2)),
        *((getattr(torchs, f"linear{i}").bias, f"fc{i}.bias") for i in (1, 2)),
        *((getattr(torchs, f"norm{i}").weight, f"norm{i}.weight") for i in (1, 2)),
        *((getattr(torchs, f"norm{i}").bias, f"norm{i}.bias") for i in (1, 2)),
    ):
        theirs.data.copy_(mine.get_parameter(name))
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(mine(tokens), torchs(tokens))


def test_a_transformer_without_positions_does_not_see_the_order_of_patches() -> None:
    model = networks.TinyTransformer(depth=2).double().eval()
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    patches = images.unfold(2, 7, 7).unfold(3, 7, 7).flatten(2, 3)  # (B, 1, 16, 7, 7)
    mixed = patches[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    shuffled = mixed.transpose(3, 4).reshape(2, 1, 28, 28)
    assert not torch.allclose(model(shuffled), model(images))
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(shuffled), model(images))
