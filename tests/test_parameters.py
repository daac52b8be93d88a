"""Names and shapes on one side, flat vectors on the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharpkit.errors import ObjectiveError, ShapeError
from sharpkit.parameters import ParameterSpace, select_names, vector_dtype

NAMES = ["blocks.0.attn.weight", "blocks.0.mlp.weight", "blocks.1.attn.weight", "head.bias"]


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ("*", [0, 1, 2, 3]),
        ("blocks.*.attn.*", [0, 2]),
        (["head.*", "blocks.0.*"], [0, 1, 3]),  # in the order of the names
        (("*.weight", "*.attn.*"), [0, 1, 2]),  # once each
        (lambda name: name.endswith("bias"), [3]),
        ("BLOCKS.*", None),
    ],
)
def test_selections(selection, chosen):
    if chosen is None:
        with pytest.raises(ObjectiveError, match="matches none of the 4"):
            select_names(NAMES, selection)
    else:
        assert select_names(NAMES, selection) == [NAMES[i] for i in chosen]


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
def test_there_and_back(shapes):
    tensors = {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    space = ParameterSpace.of(tensors)
    vector = space.flatten(tensors)
    assert vector.shape == (space.dim,)
    back = space.unflatten(vector)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[n], t) for n, t in tensors.items())


def test_flattening_copies_and_unflattening_does_not():
    weight = torch.zeros(3)
    space = ParameterSpace.of({"w": weight})
    vector = space.flatten({"w": weight})
    vector += 1
    assert not bool(weight.any())
    space.unflatten(vector)["w"].mul_(2)
    assert torch.equal(vector, torch.full((3,), 2.0))


def test_vectors_are_single_precision_at_least():
    assert vector_dtype([torch.bfloat16, torch.float16]) == torch.float32
    mixed = {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(1, dtype=torch.float64)}
    assert ParameterSpace.of(mixed).flatten(mixed).dtype == torch.float64


def test_refusals():
    with pytest.raises(ObjectiveError, match="no parameters"):
        ParameterSpace.of({})
    with pytest.raises(ObjectiveError, match="on one device"):
        ParameterSpace.of({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")})
    with pytest.raises(ShapeError, match=r"shape \(2,\)"):
        ParameterSpace.of({"a": torch.zeros(2)}).unflatten(torch.zeros(3))
