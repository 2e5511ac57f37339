"""A stream that is turned keeps the function; a narrowed one is a projection, no more."""

import copy

import pytest
import torch
import torchvision.models as tv
from channel_networks import filled
from torch import nn

from structopt import checkpoint, data, networks
from structopt.channels import channel_groups, take
from structopt.slicing import (
    FreeAttention,
    Slice,
    Slimmable,
    free_attention,
    rotate,
    sort_channels,
    to_rms_norm,
)
from structopt.slicing.recording import recorded
from structopt.training import evaluate, supervised, train


class Words(nn.Module):
    """An encoder of torch's own layers, between an embedding and a head without a bias."""

    def __init__(self, norm_first=True, norm=nn.LayerNorm, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, activation="gelu", norm_first=norm_first, batch_first=batch_first
        )
        self.embed, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.encoder = nn.TransformerEncoder(layer, 2, norm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, words):
        return self.head(self.encoder(self.embed(words) + self.positions).mean(1))


class Gated(nn.Module):
    """RMS norms as in language models; the head reads the stream without one."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8)
        self.register_buffer("positions", torch.randn(5, 8))
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down, self.head = nn.Linear(12, 8, bias=False), nn.Linear(8, 3)
        self.last = nn.RMSNorm(8, elementwise_affine=False)
        self.answer = nn.Linear(8, 3)

    def forward(self, words):
        x = 2 * self.embed(words)
        x += self.positions
        inner = self.norm(x)
        x = x + self.down(self.up(inner) * self.gate(inner).sigmoid())
        return self.head(x[:, 0] / 3) + self.answer(self.last(x).mean(1))


def vit(patch=8, **settings):
    return tv.VisionTransformer(16, patch, 2, 2, 8, 12, num_classes=5, **settings)


STEM = [tv.vision_transformer.ConvStemConfig(n, 3, 2) for n in (4, 6)]
NETWORKS = {  # of torchvision's networks the ViTs alone have one stream from end to end
    "TinyTransformer": lambda: networks.TinyTransformer(dim=8, depth=2, heads=2),
    "ViT": vit,
    "ViT, convolutional stem": lambda: vit(4, conv_stem_configs=STEM),
    "ViT, two layers at the end": lambda: vit(representation_size=6),
    "encoder": Words,
    "RMS": Gated,
}


def made(name, device, count=6):
    torch.manual_seed(0)
    model = filled(NETWORKS[name]().double()).to(device).eval()
    if name in ("encoder", "RMS"):
        return model, torch.randint(11, (count, 5), device=device)
    shape = (1, 28, 28) if name == "TinyTransformer" else (3, 16, 16)
    return model, torch.randn(count, *shape, dtype=torch.float64, device=device)


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def normalised(model, x):
    """What each norm hands on, one matrix of rows a norm."""
    rows = []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out: rows.append(out.detach().flatten(0, -2))
        )
        for name in norms(model)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return rows


# ------------------------------------------------------------------ the function stays


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_norms_become_rms_norms_exactly(name, device):
    model, x = made(name, device)
    state = copy.deepcopy(model.state_dict())
    converted = to_rms_norm(model, x[:1])
    assert_close(converted(x), model(x))
    with torch.no_grad():  # where torch would take its fused path
        assert_close(converted(x), model(x))
    assert all(type(converted.get_submodule(n)) is nn.RMSNorm for n in norms(model))
    assert all((converted.get_submodule(n).weight == 1).all() for n in norms(model))
    assert not any(module.training for module in converted.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_turned_stream_keeps_the_function_and_lies_on_its_principal_axes(name, device):
    model, x = made(name, device)
    rotated = rotate(model, x[:1], [x[:2], (x[2:], None)])
    assert_close(rotated.model(x), model(x))
    rows = torch.cat(normalised(rotated.model, x))
    gram = rows.T @ rows
    assert_close(gram / gram.trace(), torch.diag(rotated.shares.to(device)))
    assert (rotated.shares.diff() <= 1e-12).all()
    whole = rotated.narrow(1.0)
    assert_close(whole(x), model(x))
    assert whole is not rotated.model
    assert rotated.lost(1.0) == 0
    if name != "RMS":  # no layer norm sees the mean: one axis costs nothing
        assert rotated.lost(7 / 8) < 1e-12
        assert_close(rotated.narrow(7 / 8)(x), model(x))


def test_weights_that_are_buffers_are_turned_as_parameters_are(device):
    model, x = made("TinyTransformer", device)
    expected = rotate(model, x[:1], [x])
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    found = rotate(model, x[:1], [x])
    assert_close(found.model(x), model(x))
    assert_close(found.narrow(0.5)(x), expected.narrow(0.5)(x))


@pytest.mark.parametrize("name", ["TinyTransformer", "encoder"])
def test_in_inference_mode_too_and_what_comes_out_trains(name, device):
    model, x = made(name, device)
    with torch.inference_mode():
        rotated = rotate(model, x[:1], [x])
        made_there = [to_rms_norm(model, x[:1]), rotated.model]
        made_there += [rotated.narrow(width) for width in (1.0, 0.5)]
    for one in made_there:
        one(x).sum().backward()
    assert_close(rotated.model(x), model(x))


class Viewing(nn.Module):
    """One number is the width of the stream and of what lies between two layers."""

    def __init__(self):
        super().__init__()
        self.size, self.embed, self.norm = 4, nn.Linear(3, 4), nn.RMSNorm(4)
        self.up, self.down, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x).view(-1, self.size)
        inner = self.up(self.norm(x)).view(-1, self.size)
        return self.head(self.norm(x + self.down(inner.relu())))


def test_widths_that_change_together_stand_in_the_way_of_narrowing_alone(device):
    model, x = filled(Viewing().double()).to(device), torch.randn(6, 3, device=device).double()
    rotated = rotate(model, x, [x])
    assert_close(rotated.model(x), model(x))
    with pytest.raises(ValueError, match=r"narrowed .* of their size; up, down would get the wid"):
        rotated.narrow(0.5)


class Between(nn.Module):
    """Another norm stands between the two layers of the residual block."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
        self.block = nn.Sequential(
            nn.LayerNorm(4), nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4)
        )

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.block(x))


def test_the_stream_is_what_the_most_norms_normalise(device):
    model, x = filled(Between().double()).to(device), torch.randn(6, 3, device=device).double()
    rotated = rotate(model, x, [x])
    assert len(rotated.shares) == 4
    assert_close(rotated.model(x), model(x))


VITS = {  # size of a patch, layers, heads: all of torchvision's networks with one stream
    "vit_b_16": (16, 12, 12),
    "vit_b_32": (32, 12, 12),
    "vit_l_16": (16, 24, 16),
    "vit_l_32": (32, 24, 16),
    "vit_h_14": (14, 32, 16),
}


@pytest.mark.parametrize("name", VITS)
def test_the_streams_of_torchvision_are_turned_exactly(name, device):
    """As deep as they are, with two numbers a head."""
    assert callable(getattr(tv, name))
    patch, depth, heads = VITS[name]
    torch.manual_seed(0)
    model = tv.VisionTransformer(
        2 * patch, patch, depth, heads, 2 * heads, 4 * heads, num_classes=5
    )
    model = filled(model.double()).to(device).eval()
    x = torch.randn(3, 3, 2 * patch, 2 * patch, dtype=torch.float64, device=device)
    rotated = rotate(model, x[:1], [x[1:]])
    assert_close(rotated.model(x), model(x))
    assert not torch.equal(rotated.model.conv_proj.weight, model.conv_proj.weight)


def test_the_largest_entry_of_each_axis_is_positive(device):
    """Eigenvectors have no sign: without a rule it could differ from machine to machine."""
    model, x = made("RMS", device)
    turned = rotate(model, x[:1], [x]).model.embed.weight
    axes = torch.linalg.pinv(model.embed.weight) @ turned
    assert_close(axes.T @ axes, torch.eye(8).to(axes))
    assert (axes.gather(0, axes.abs().argmax(0)[None]) > 0).all()


# ------------------------------------------------------------------ what narrowing leaves


@pytest.mark.parametrize("name", NETWORKS)
def test_a_narrow_stream_is_a_projection(name, device):
    """Reference: the full network, its stream projected wherever it is read."""
    model, x = made(name, device)
    full = to_rms_norm(model, x[:1])
    rows = torch.cat(normalised(full, x))
    axes = torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :4]
    for module in full.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, given: (given[0] @ axes @ axes.T,))
    if name == "RMS":
        full.head.register_forward_pre_hook(lambda _, given: (given[0] @ axes @ axes.T,))
    rotated = rotate(model, x[:1], [x])
    narrow = rotated.narrow(0.5)
    assert_close(narrow(x), full(x))
    sizes = {p.shape[-1] for n, p in narrow.named_parameters() if n.removesuffix(".weight") in
             norms(narrow)}  # fmt: skip
    assert sizes == {4}
    assert narrow.training == model.training


@torch.no_grad()
def test_the_error_is_bounded_by_the_variance_left_out(device):
    """With one norm and a head that keeps lengths; a row at an angle φ to what is kept of it is
    off by 2 - 2 cos φ, of which sin² φ was left out.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 8), nn.LayerNorm(8, 1e-14), nn.Linear(8, 8, bias=False))
    model = model.double().to(device)
    nn.init.orthogonal_(model[2].weight)
    x = torch.arange(40, device=device)[None]
    rotated, full, errors = rotate(model, x, [x]), model(x), []
    rows = normalised(rotated.model, x)[0]
    for kept in range(1, 9):
        wrong = (rotated.narrow(kept / 8)(x) - full).square().sum() / full.square().sum()
        cosine, lost = rows[:, :kept].norm(dim=1) / rows.norm(dim=1), rotated.lost(kept / 8)
        assert float(wrong) == pytest.approx(float(2 - 2 * cosine.mean()), rel=1e-9, abs=1e-12)
        assert float((1 - cosine.square()).mean()) == pytest.approx(lost, rel=1e-9, abs=1e-12)
        assert lost - 1e-12 <= float(wrong) <= 2 * lost + 1e-12
        errors.append(float(wrong))
    assert errors[:7] == sorted(errors[:7], reverse=True)  # the last axis holds nothing


def test_the_first_reader_misses_what_its_own_rows_have_on_the_other_axes(device):
    model, x = made("TinyTransformer", device)
    rotated = rotate(model, x[:1], [x])
    rows, narrow = (normalised(m, x)[0] for m in (rotated.model, rotated.narrow(0.5)))
    full = rows.square().sum()
    missed = float(rows[:, 4:].square().sum() / full)
    error = float((rows - nn.functional.pad(narrow, (0, 4))).square().sum() / full)
    assert missed <= error <= 2 * missed
    assert 0 < missed < rotated.lost(0.5) * len(norms(model))


def test_a_trained_network_loses_less_than_by_channels(device):
    sample = data.fashion_mnist()[0]
    learn = data.Examples(sample.inputs[:1000], sample.targets[:1000])
    held = data.Examples(sample.inputs[1000:2000], sample.targets[1000:2000])
    torch.manual_seed(0)
    model = networks.TinyTransformer(dim=16, depth=2, patch=14)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    batches = data.batches(learn, 50, seed=0)
    train(model, batches, supervised(), optimizer, epochs=4, device=device, autocast=None)
    x = learn.inputs[:1].to(device)
    rotated = rotate(model, x, [learn.inputs[:500]])
    by_channel = Slimmable(sort_channels(model, x), x, [])
    rows = []
    for width in (0.25, 0.5, 0.75):
        narrow = by_channel.extract(Slice(shares={"embed": width}))
        rows.append([evaluate(rotated.narrow(width), held), evaluate(narrow, held)])
    turned, channels = torch.tensor(rows).T
    assert (turned > channels).all()
    assert (turned - channels).mean() > 0.1
    assert evaluate(rotated.model, held) == pytest.approx(evaluate(model, held), abs=0.002)


# ------------------------------------------------------------------ free attention


class Listed(Words):
    """Its layers run under other names than their first."""

    def __init__(self):
        super().__init__()
        self.run = nn.Sequential(self.embed, *self.encoder.layers, self.encoder.norm)

    def forward(self, words):
        return self.head(self.run(words).mean(1))


def test_layers_of_two_names_are_exchanged_under_both(device):
    model, words = Listed().to(device).double().eval(), torch.randint(11, (3, 5), device=device)
    both = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    both.append(both[0])
    free = free_attention(both)
    assert isinstance(free[1], FreeAttention)
    assert free[0] is free[1]
    model.last, model.final = model.encoder.norm, nn.Sequential(model.encoder.norm)
    made = to_rms_norm(model, words)
    torch.testing.assert_close(made(words), model(words))
    assert not any(isinstance(module, nn.LayerNorm) for module in made.modules())
    assert isinstance(made.final[0], nn.RMSNorm)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_free_attention_is_torchs(batch_first, weights, device):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=weights).double().to(device)
    layer, free = filled(layer), free_attention(layer)
    query, key = (torch.randn(3, n, 8, dtype=torch.float64, device=device) for n in (4, 5))
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    causal = torch.ones(4, 4, device=device).triu(1).bool()
    each = torch.randn(6, 4, 5, dtype=torch.float64, device=device)
    ends = torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0, 0, 0, 0, 1]], device=device).bool()
    for given, how in (
        ((query, query, query), {}),
        ((query, query, query), {"attn_mask": causal, "is_causal": True}),
        ((query, key, key), {"key_padding_mask": ends, "average_attn_weights": False}),
        ((query, key, key + 1), {"attn_mask": each > 1, "key_padding_mask": ends}),
        ((query, key, key), {"attn_mask": each}),
        ((query[0], key[0], key[0]), {}),
    ):
        expected, found = (one(*given, need_weights=weights, **how) for one in (layer, free))
        assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if weights:
            assert_close(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_of_torch_with_free_attention_masks_as_before(device):
    """Torch looks for the weights of its own attention to leave out what is padding."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().to(device).eval()
    free, x = free_attention(model), torch.randn(3, 5, 8, dtype=torch.float64, device=device)
    there = torch.ones(3, 5, device=device).bool()
    there[0, 3:] = False
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found, expected = (m(x, src_key_padding_mask=~there) for m in (free, model))
            assert_close(found[there], expected[there])


def test_free_attention_drops_and_refuses_as_torchs():
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    free, x = free_attention(layer), torch.ones(1, 4, 8)
    assert isinstance(free, FreeAttention)
    for weights in (True, False):
        runs = [free(x, x, x, need_weights=weights)[0] for _ in range(2)]
        assert not torch.equal(*runs)
    with pytest.raises(ValueError, match="give the mask too"):
        free(x, x, x, is_causal=True)
    odd = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(ValueError, match="0 reads keys or values of another width"):
        free_attention(odd)


# ------------------------------------------------------------------ afterwards


def test_a_narrow_network_is_saved_and_loaded(device, tmp_path):
    for name, fresh in (("TinyTransformer", lambda m: m), ("ViT", free_attention)):
        model, x = made(name, device)
        narrow = rotate(model, x[:1], [x]).narrow(0.5)
        checkpoint.save(narrow, tmp_path / "narrow.safetensors")
        into = fresh(NETWORKS[name]().double())
        loaded = checkpoint.load(tmp_path / "narrow.safetensors", into=into)
        assert_close(loaded.to(device).eval()(x), narrow(x))


def test_number_format_and_what_is_trained_stay(device):
    model, x = made("encoder", device)
    model = model.float().train()
    for part in (model.embed, model.encoder.layers[1].norm1, model.head):
        part.requires_grad_(False)
    rotated = rotate(model, x[:1], [x])
    narrow = rotated.narrow(0.5)
    for one in (rotated.model, narrow):
        assert all(module.training for module in one.modules())
        assert {p.dtype for p in one.parameters()} == {torch.float32}
        held = {n for n, p in one.named_parameters() if not p.requires_grad}
        norm = "encoder.layers.1.norm1.weight"  # the head has got a bias from the norm before it
        assert held == {"embed.weight", norm, "head.weight", "head.bias"}
    torch.testing.assert_close(rotated.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    inner = channel_groups(narrow, x[:1])["encoder.layers.0.linear1"]
    take(narrow, {inner: range(6)})(x).sum().backward()  # it is pruned as any other network


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_narrow_norm_adds_the_same_epsilon_in_any_format(dtype, device):
    """Where none is given torch takes that of the format that it computes in."""
    model, x = made("RMS", device)
    for writer in (model.embed, model.down):
        writer.weight.mul_(1e-3)
    model.positions.mul_(1e-3)
    rotated = rotate(model.to(dtype), x[:1], [x])
    narrow, silent = rotated.narrow(0.5).norm, copy.deepcopy(rotated.model).norm
    rows = 1e-3 * torch.randn(6, 8, device=device).to(dtype)
    rows[:, 4:] = 0
    tolerance = 4 * torch.finfo(dtype).eps
    found, expected = narrow(rows[:, :4]), silent(rows)[:, :4]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ what cannot be turned


class Wrong(nn.Module):
    """A residual network that does one thing to its stream that a rotation does not allow."""

    def __init__(self, act, norm=None, head=None):
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 4), norm or nn.LayerNorm(4)
        self.inner, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.past, self.rows = nn.Linear(4, 4), nn.Linear(2, 2)
        self.act, self.head = act, head or nn.Linear(4, 2)

    def forward(self, x):
        x = self.act(self, self.embed(x))
        x = x + self.inner(self.norm(x))
        return self.head(self.norm(x))


class OwnNorm(nn.LayerNorm):
    pass


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Doubled(nn.Module):
    def forward(self, x):
        return x + x


def test_copies_of_the_stream_and_zeros_are_the_stream(device):
    def act(_, x):
        none = [x.new_zeros(1, 4), torch.zeros_like(x[:1])]
        x = torch.cat([x[:1].clone(), x[1:].detach(), *none]).to(torch.float64, copy=True)
        return torch.ops.aten.alias(torch.native_dropout(x, 0.0, True)[0])

    model, x = filled(Wrong(act).double()).to(device), torch.randn(3, 3, device=device).double()
    assert_close(rotate(model, x, [x]).model(x), model(x))


WRONG = {
    "the op relu does not treat": Wrong(lambda m, x: x.relu()),
    "the op mul does not treat": Wrong(lambda m, x: x * m.scale),
    "the op add does not treat": Wrong(lambda m, x: x + 1.0),
    "the op sub does not treat": Wrong(lambda m, x: x - 1),
    "the op add does not treat all axes": Wrong(lambda m, x: x + True),
    "in the model, the op add does not treat": Wrong(lambda m, x: x + torch.ones(2, 1)),
    "the op div does not treat": Wrong(lambda m, x: torch.ones(2, 1) / x),
    "the op slice takes the axes": Wrong(lambda m, x: torch.cat([x[..., 2:], x[..., :2]], -1)),
    "the op mean takes the axes": Wrong(lambda m, x: x - x.mean(-1, keepdim=True)),
    r"the op add adds what a norm gave": Wrong(lambda m, x: x + m.norm(x)),
    "in inner, reads the stream through two norms": Wrong(lambda m, x: x + m.inner(x)),
    "no residual stream is found": Wrong(lambda m, x: x, norm=OwnNorm(4)),
    "no residual stream is found: an": Wrong(lambda m, x: x, norm=nn.LayerNorm((2, 4))),
    "in head.1, the op convolution reads the stream, and is no nn.Linear": Wrong(
        lambda m, x: x, head=nn.Sequential(nn.Unflatten(-1, (4, 1)), nn.Conv1d(4, 2, 1))
    ),
    "the op ones makes a part of the stream": Wrong(lambda m, x: torch.cat([x, torch.ones(1, 4)])),
    "in rows, the op .* reads the stream, and is no nn.Linear": Wrong(
        lambda m, x: x + m.rows(x.T).T  # over positions, as an MLP-Mixer does
    ),
    "in the model, the op .* reads the stream, and is no nn.Linear": Wrong(
        lambda m, x: x + x @ (2 * m.past.weight).T  # what is made of a weight is none
    ),
    r"in head\.0, the op .* reads the stream, and is no nn.Linear": Wrong(
        lambda m, x: x, head=nn.Sequential(OwnLinear(4, 2))
    ),
    "in the model, the op addmm reads the stream, and is no nn.Linear": Wrong(
        lambda m, x: torch.addmm(x, torch.ones(2, 4), m.past.weight)  # adds to it
    ),
    r"in head\.0, .* normalises what another norm gave": Wrong(
        lambda m, x: x, head=nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    ),
    r"in head\.0, the op add adds what a norm gave": Wrong(
        lambda m, x: x, head=nn.Sequential(Doubled(), nn.Linear(4, 2))
    ),
    "in past, reads the stream past the norms": Wrong(lambda m, x: x + m.past(x)),
    "cannot be given RMS norms exactly": Wrong(
        lambda m, x: x if isinstance(m.norm, nn.LayerNorm) else 2 * x
    ),
    "is what the model gives": Wrong(lambda m, x: x, head=nn.Identity()),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_cannot_be_turned_is_refused_with_the_reason(reason):
    model, x = WRONG[reason], torch.randn(2, 3)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        rotate(model, x, [x])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert type(model.norm) in (nn.LayerNorm, OwnNorm)


def test_networks_of_torch_that_cannot_be_turned():
    words, image = torch.zeros(1, 5).long(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"in encoder.layers.0, .* \(post-norm"):
        to_rms_norm(Words(norm_first=False), words)
    with pytest.raises(ValueError, match="no residual stream"):
        to_rms_norm(tv.resnet18(num_classes=2), image)
    with pytest.raises(ValueError, match="no residual stream"):  # what no weight makes is none
        to_rms_norm(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), torch.randn(2, 3))
    swin = tv.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [4, 4])  # its stream changes its width
    with pytest.raises(ValueError, match=r"in features\.3\.0\.attn, the op constant_pad_nd"):
        to_rms_norm(swin, image)
    blocks = [tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)]
    with pytest.raises(ValueError, match="the op convolution reads the stream"):
        to_rms_norm(tv.ConvNeXt(blocks), image)
    tied = Words()
    tied.head.weight = tied.embed.weight
    with pytest.raises(ValueError, match="in embed, one weight writes the stream and reads it"):
        to_rms_norm(tied, words)
    mixed = Words(norm=nn.RMSNorm)
    with pytest.raises(ValueError, match="some norms subtract the mean"):
        to_rms_norm(mixed, words)


class Writing(nn.Module):
    """Writes into its buffer and its input; fails where it has no words, or too many."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x, problem=None):
        if problem is not None:
            raise problem
        self.calls.add_(1)
        return self.linear(x.mul_(2)), x.sum()


def test_recording_leaves_no_trace(device):
    model, x = Writing().to(device), torch.ones(1, 2, device=device)
    given = recorded(model, x)[3]
    assert [len(mirror) for mirror in given] == [2, 0]
    assert not model.calls.any()
    assert (x == 1).all()
    assert [vars(tensor) for tensor in (x, *model.parameters(), *model.buffers())] == [{}] * 4
    for problem, said in ((RuntimeError("one\ntwo"), "one"), (AssertionError(), "AssertionError")):
        with pytest.raises(ValueError, match=rf"does not accept the example: {said}$"):
            recorded(model, {"x": x, "problem": problem})


def test_what_is_wrong_is_named():
    model, x = networks.TinyTransformer(dim=8, depth=1), torch.zeros(1, 1, 28, 28)
    with pytest.raises(ValueError, match=r"turned needs values.* none on the meta device"):
        to_rms_norm(copy.deepcopy(model).to("meta"), x.to("meta"))
    with pytest.raises(ValueError, match="the batches are empty"):
        rotate(model, x, [])
    with pytest.raises(ValueError, match="is NaN or infinite: it has no principal axes"):
        rotate(model, x, [torch.full((2, 1, 28, 28), torch.nan)])
    with pytest.raises(ValueError, match="does not accept the example"):
        rotate(model, torch.zeros(1, 3, 28, 28), [])
    rotated = rotate(model, x, [torch.randn(2, 1, 28, 28)])
    for width in (0, 1.5, float("nan"), None, "half"):
        with pytest.raises(ValueError, match=r"in \(0, 1\], not"):
            rotated.narrow(width)
    with pytest.raises(ValueError, match="leaves none of the 8 axes of the stream: take at least"):
        rotated.lost(0.01)
