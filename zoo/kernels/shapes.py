"""Shapes of an op's arguments, checked by letter."""

from __future__ import annotations

from torch import Tensor

from zoo.errors import UnsupportedError


def check_shapes(op: str, **arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """The size behind each letter: `check_shapes("conv", x=(x, "BTD"), w=(w, "DW"))` -> {"B": 2, "T": 64, ...}.

    A letter has one size throughout; an argument that is None is left out.

    Raises:
        UnsupportedError: an argument has another number of axes, or another size than its letter has already.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        shape = tensor.shape
        fits = len(shape) == len(letters)
        if fits:
            # Written out, since every call of every op comes by here.
            for letter, size in zip(letters, shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    fits = False
                    break
        if not fits:
            expected = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
            raise UnsupportedError(f"{op}: {name} has shape {tuple(shape)}; expected ({expected}).")
    return sizes
