"""Nested state as named tensors and an outline that JSON holds, and back: no pickle."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def flatten(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The outline of ``tree``; its tensors are put into ``tensors`` under their paths.

    A tree is made of dicts (keys: text or integers), lists, tuples, tensors, numbers, text and
    None. Raises ``ValueError`` for anything else, naming where it is.

    >>> found = {}
    >>> flatten({"step": 3, "moments": [Tensor()]}, found)
    {'dict': [['step', 3], ['moments', {'list': [{'tensor': '/moments/0'}]}]]}
    >>> list(found)
    ['/moments/0']
    """
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {"tensor": path}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, dict) and all(isinstance(key, (str, int)) for key in tree):
        return {"dict": [[k, flatten(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [flatten(item, tensors, f"{path}/{i}") for i, item in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    raise ValueError(
        f"a checkpoint cannot hold {path}, a {type(tree).__name__}: state is made of tensors, "
        "numbers, text, lists and dicts"
    )


def restore(outline: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that :func:`flatten` took apart. Raises ``ValueError`` for another outline.

    >>> restore({"dict": [["betas", {"tuple": [0.9, 0.99]}]]}, {})
    {'betas': (0.9, 0.99)}
    """
    if not isinstance(outline, dict):
        return outline
    try:
        ((kind, content),) = outline.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: restore(value, tensors) for key, value in content}
        items = [restore(item, tensors) for item in content]
        return {"list": list, "tuple": tuple}[kind](items)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is not a training checkpoint ({error!r})") from error
