"""Early exits: an answer as soon as the network is sure enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structopt import measure
from structopt.losses.checks import need_values, real
from structopt.measure.running import device_of, with_batch
from structopt.slicing.asking import own
from structopt.slicing.heads import confidence, described, head_for, outputs_of
from structopt.training import evaluating

Leaves = Callable[[int, Tensor], Tensor]  # number of an exit, its logits (B, C) -> who leaves (B,)


@dataclass(frozen=True, eq=False)
class Answers:
    """The logits of each example, (B, C), and the number of the exit that gave them, (B,)."""

    logits: Tensor
    exits: Tensor


class _Done(Exception):
    """Every example has left: the rest of the network need not run."""


class EarlyExits(nn.Module):
    """A classifier with a head at some of its modules, each of which may answer.

    ``network(x)`` gives the logits of all heads, the network's own last: a tuple to train on.
    ``network.answer(x, threshold)`` lets each example leave at the first head whose largest
    probability is at least the threshold; what comes behind runs on the others alone, and not at
    all where none is left. After Teerapittayanon et al., 2016, "BranchyNet".

    Args:
        model: gives logits (B, C) for inputs (B, …). It is used, not copied.
        example: inputs for it.
        at: names of modules whose output is all that the rest of the network reads. Each gets a
            new head: the mean over positions and a linear layer. Or ``{name: head}``, which is
            asked for where a model with 1-d convolutions gives three axes: which are the channels?

    Raises:
        ValueError: a module that does not exist, is not called exactly once, gives no tensor of
            features, or past which other tensors are carried (a residual around it), so that
            examples could not leave there.

    Example:
        >>> from structopt.networks import ResNet20
        >>> image = torch.zeros(1, 1, 28, 28)
        >>> network = EarlyExits(ResNet20(width=4), image, ["stage1", "stage2"]).eval()
        >>> [logits.shape for logits in network(image)]
        [torch.Size([1, 10]), torch.Size([1, 10]), torch.Size([1, 10])]
        >>> network.answer(image, threshold=0.0).exits
        tensor([0])
    """

    def __init__(
        self, model: nn.Module, example: Tensor, at: Sequence[str] | Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.model, names = model, list(at)
        if isinstance(at, str) or not names:
            raise ValueError(f"at names the modules that get an exit, at least one: {at!r}")
        need_values("the trial of the exits", model.parameters())
        found, final = outputs_of(model, example, names)
        if not isinstance(final, Tensor) or final.ndim != 2:
            raise ValueError(
                f"the model gives {described(final)}: exits answer as it does, with logits (B, C)"
            )
        self.at = tuple(sorted(names, key=list(found).index))
        given = at if isinstance(at, Mapping) else {}
        self.heads = nn.ModuleList(
            given.get(name) or head_for(name, found[name], final, model) for name in self.at
        )
        _verify(self, example)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The logits of every exit, all examples: (B, C) each.

        Raises ValueError where the model does not run an exit's module once, as with layer drop.
        """
        found: list[Tensor] = []

        def note(number: int, output: Tensor) -> Tensor:
            found.append(self.heads[number](output))
            return output

        final = self._run(inputs, note)
        return (*found, final)

    def answer(self, inputs: Tensor, threshold: float) -> Answers:
        """Let each example leave where the largest probability is at least the threshold.

        0 answers everything at the first exit, 1.01 nothing before the end. Use it in evaluation
        mode; each exit waits for the device, since what runs next depends on it. Raises ValueError
        for what is no number, and as the forward pass does.
        """
        if math.isnan(real(threshold)):
            raise ValueError(f"threshold={threshold!r}: give the confidence that is enough, 0 to 1")
        return self.leave(inputs, lambda _, logits: confidence(logits) >= threshold)

    def leave(self, inputs: Tensor, leaves: Leaves) -> Answers:
        """As `answer`, with a rule of your own: ``leaves(exit, logits)`` says who leaves, (B,)."""
        waiting = torch.arange(len(inputs), device=inputs.device)
        gone, logits, exits = list[Tensor](), list[Tensor](), list[Tensor]()

        def depart(who: Tensor, answer: Tensor, number: int) -> None:
            gone.append(who)
            logits.append(answer)
            exits.append(torch.full_like(who, number))

        def decide(number: int, output: Tensor) -> Tensor:
            nonlocal waiting
            answer = self.heads[number](output)
            going = leaves(number, answer)
            if getattr(going, "dtype", None) != torch.bool or going.shape != answer.shape[:1]:
                raise ValueError(
                    f"leaves(exit, logits) gives {described(going)}: give a truth value an example"
                )
            order = going.byte().argsort(stable=True)  # who stays comes first
            staying = len(going) - int(going.sum())  # the one place that waits for the device
            stay, go = order[:staying], order[staying:]
            depart(waiting[go], answer[go], number)
            if not staying:
                raise _Done
            if staying == len(going):
                return output
            waiting = waiting[stay]
            return output.index_select(0, stay)

        try:
            final = self._run(inputs, decide)
            depart(waiting, final, len(self.at))
        except _Done:
            pass
        back = torch.cat(gone).argsort()
        return Answers(torch.cat(logits)[back], torch.cat(exits)[back])

    def deciding(self, threshold: float) -> nn.Module:
        """A module x → logits that leaves early: to evaluate, to time, to deploy."""
        return Deciding(self, threshold)

    def macs(self, example: Tensor) -> list[int]:
        """Multiply-accumulates for one example until each exit, with the heads on the way."""

        def leaves(at: int) -> Leaves:
            return lambda number, logits: torch.full_like(logits[:, 0], number == at).bool()

        with evaluating(self):
            return [
                measure.cost(partial(self.leave, leaves=leaves(at)), own(example)).macs
                for at in range(len(self.at) + 1)
            ]

    def _run(self, inputs: Tensor, at_exit: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Run the model; what `at_exit` makes of a module's output is what the rest reads."""
        ran = list[str]()

        def see(number: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            ran.append(self.at[number])
            return at_exit(number, output)

        handles = [
            self.model.get_submodule(name).register_forward_hook(partial(see, number))
            for number, name in enumerate(self.at)
        ]
        try:
            logits: Tensor = self.model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        if ran != list(self.at):  # one exit would be taken for another, or passed over
            raise ValueError(
                f"the modules with exits ran as {ran}, not once each in the order {list(self.at)}: "
                "does the model leave layers out in training? Was it compiled? Switch that off"
            )
        return logits


class Deciding(nn.Module):
    """A network with exits as a plain classifier; made by :meth:`EarlyExits.deciding`."""

    def __init__(self, network: EarlyExits, threshold: float) -> None:
        super().__init__()
        self.network, self.threshold = network, threshold

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, C), of the exit where each example left."""
        return self.network.answer(inputs, self.threshold).logits

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


def _verify(network: EarlyExits, example: Tensor) -> None:
    """Those who stay must get the answers that they get when nobody leaves."""
    device = device_of(network.model, example)
    batch = with_batch(example, 3).to(device)
    if batch.is_floating_point():
        noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))
        batch = batch + noise.to(batch)
    with torch.no_grad(), evaluating(network):
        try:
            expected = network(own(batch))  # a model may write to its inputs
        except RuntimeError as failure:
            raise ValueError(
                f"the model with its heads does not run on such inputs ({failure}): does each head "
                "take what its module gives?"
            ) from failure
        if not expected[-1].isfinite().any():
            raise ValueError(
                "the model gives no finite number on the example, so that nothing can be compared: "
                "give another example, or better weights"
            )
        for name, logits in zip(network.at, expected, strict=False):
            if logits.shape != expected[-1].shape:
                raise ValueError(
                    f"the head of {name} gives {described(logits)}, the model "
                    f"{described(expected[-1])}"
                )
        for number, name in enumerate(network.at):
            for stay in ([1], [0, 2]):
                index = torch.tensor(stay, device=device)

                def leaves(n: int, y: Tensor, at: int = number, stay: Tensor = index) -> Tensor:
                    if n != at:
                        return torch.zeros_like(y[:, 0]).bool()
                    return torch.ones_like(y[:, 0]).bool().index_fill(0, stay, False)

                _verify_rest(network, batch, leaves, name, expected[-1][index], index)


def _verify_rest(
    network: EarlyExits,
    batch: Tensor,
    leaves: Leaves,
    name: str,
    expected: Tensor,
    index: Tensor,
) -> None:
    problem = "the others get other answers"
    try:
        found = network.leave(own(batch), leaves).logits[index]
        scale = float(expected.nan_to_num(0, 0, 0).abs().max())
        if torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
            return
    except (RuntimeError, ValueError, IndexError) as failure:
        problem = str(failure)
    raise ValueError(
        f"no example can leave at {name}: past it the model carries other tensors too, such as a "
        f"residual ({problem}); put the exit where one tensor is all that passes"
    )
