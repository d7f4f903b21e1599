"""A function and its arguments as what a program is compiled for, and what it computes with.

jax knows a function again by its identity alone, and takes arrays alone as arguments. Here equal
partials are the same program, and modules travel as their arrays.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class _Static:
    """A value that a program is compiled for; one without a hash is equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            self._hash, self._hashable = hash(value), True
        except TypeError:
            self._hash, self._hashable = id(value), False

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (self._hashable and bool(self.value == other.value))


def _travels(leaf: Any, itself: bool) -> bool:
    """Whether a leaf is an argument of the compiled program, which is compiled for all others.

    Numbers are, that are arguments themselves or have a fraction. Inside a module whole numbers and
    truth values decide what it computes (Equinox's `inference`, sizes).
    """
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSU"
    whole = itself and isinstance(leaf, int)
    return whole or isinstance(leaf, jax.Array | np.generic | float | complex)


@jax.tree_util.register_pytree_node_class
class Packed:
    """Any pytree as one of its arrays alone, which goes through jit, vmap and scan: `tree` gives it back.

    Leaves that are no arrays, such as a module's functions and sizes, are its structure.
    """

    arrays: list[Any]
    code: Any  # hashable, and equal where all but the arrays is

    def __init__(self, tree: Any, depth: int = 0) -> None:
        """depth: of the leaves that are arguments themselves."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        travelling = [_travels(leaf, len(path) == depth) for path, leaf in leaves]
        self.arrays = [leaf for (_, leaf), go in zip(leaves, travelling, strict=True) if go]
        rest = [None if go else _Static(x) for (_, x), go in zip(leaves, travelling, strict=True)]
        self.code = tuple(rest), structure

    @property
    def tree(self) -> Any:
        """What was packed."""
        rest, structure = self.code
        arrays = iter(self.arrays)
        leaves = [next(arrays) if value is None else value.value for value in rest]
        return jax.tree.unflatten(structure, leaves)

    def tree_flatten(self) -> tuple[list[Any], Any]:
        return self.arrays, self.code

    @classmethod
    def tree_unflatten(cls, code: Any, arrays: Any) -> Packed:
        packed = object.__new__(cls)
        packed.arrays, packed.code = list(arrays), code
        return packed


class Method(NamedTuple):
    """A method of a pytree, such as an nnx module, as a pytree: its owner's arrays travel."""

    function: Callable[..., Any]
    owner: Any

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.function(self.owner, *args, **keywords)


class _Seen:
    """A function of an object as it is now: where an attribute has changed it is another program."""

    def __init__(self, function: Callable[..., Any], owner: Any) -> None:
        self._function = function
        self._code = getattr(function, "__func__", None)
        self._state: list[Any] = [_Static(owner)]
        for name, value in vars(owner).items():
            try:
                leaves, structure = jax.tree.flatten(value)
            except (TypeError, ValueError):  # a dict whose keys have no order
                leaves, structure = [value], None
            self._state += [name, structure, *map(_Static, leaves)]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._function(*args, **keywords)

    def __hash__(self) -> int:
        return hash(self._state[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Seen):
            return False
        return self._code is other._code and self._state == other._state


def has_arrays(tree: Any) -> bool:
    """Whether any leaf is one of jax's or numpy's."""
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(tree))


def unbound(function: Callable[..., Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A function without what partials have bound to it, and that: equal partials are the same.

    What an object computes depends on its attributes: those of a pytree travel, or else they are
    compared, as far as they are seen, which those of an attribute's own objects are not.
    """
    args, keywords = (), {}
    while isinstance(function, functools.partial):
        args, keywords = (*function.args, *args), function.keywords | keywords
        function = function.func
    return of_owner(function), args, keywords


def of_owner(function: Callable[..., Any]) -> Any:
    """A function that an object has or is, with what it reads of it; any other as it is."""
    is_method = inspect.ismethod(function)
    owner = function.__self__ if is_method else function
    if isinstance(owner, type) or inspect.isroutine(owner) or inspect.ismodule(owner):
        return function
    leaves = jax.tree.leaves(owner)
    if len(leaves) == 1 and leaves[0] is owner:
        # What jax.jit and the like wrap is code.
        plain = hasattr(owner, "__dict__") and not hasattr(owner, "__wrapped__")
        return _Seen(function, owner) if plain and not isinstance(owner, _Seen) else function
    if is_method and has_arrays(leaves):
        return Method(function.__func__, owner)
    return function


class Program:
    """function(key, x, *args) as its arrays, and all else, of which an equal one compiles once."""

    def __init__(self, function: Callable[..., Any], args: Any, static: Mapping[str, Any]) -> None:
        function, bound, keywords = unbound(function)
        packed = Packed(([function], bound, keywords, args), depth=2)
        self.arrays, self.code = packed.arrays, (packed.code, tuple(static.items()))


def call(code: Any, arrays: list[Any], *first: Any) -> Any:
    """The program's function of (key, x), or whatever comes first."""
    packed, static = code
    (function,), bound, keywords, args = Packed.tree_unflatten(packed, arrays).tree
    return function(*bound, *first, *args, **keywords, **dict(static))
