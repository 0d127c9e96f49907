"""Draws from a tail: the right distribution, the same again, and never what has no probability."""

import numpy as np
import torch

from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.tail_draws import ROWS, draw_from, uniforms


def test_frequencies_are_the_probabilities() -> None:
    logit_V = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -3.0, -torch.inf])
    uniform = torch.from_numpy(uniforms(5, 1, 200_000))
    drawn = draw_from(logit_V[None], uniform)[0]
    share = torch.bincount(drawn, minlength=6) / len(drawn)
    expected = logit_V.softmax(0)
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert (share[expected == 0] == 0).all()
    assert ((share - expected).abs() <= 5 * error).all()


def test_every_draw_is_where_the_running_sum_passes_the_number() -> None:
    rng = np.random.default_rng(0)
    logit_PV = rng.normal(0, 3, (2 * ROWS + 3, 40)).astype(np.float32)
    logit_PV[:, ::7] = -np.inf
    uniform_PM = rng.random((len(logit_PV), 6))
    probability = np.exp(logit_PV.astype(np.float64))
    until = (probability / probability.sum(1, keepdims=True)).cumsum(1)
    expected = (until[:, None] <= uniform_PM[:, :, None]).sum(2)
    found = draw_from(torch.from_numpy(logit_PV), torch.from_numpy(uniform_PM))
    assert found.numpy().tolist() == expected.tolist()


def test_the_ends_of_the_range_are_tokens_with_probability() -> None:
    logit_PV = torch.tensor([[-torch.inf, -torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    nearly_one = float(np.nextafter(1, 0))
    assert draw_from(logit_PV, torch.tensor([[0.0, nearly_one]]).double()).tolist() == [[2, 4]]


def test_nothing_is_drawn_from_nothing() -> None:
    logit_PV = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]])
    drawn = draw_from(logit_PV, torch.full((2, 3), 0.5).double())
    assert drawn.tolist() == [[UNUSED_ID] * 3, [0] * 3]
    assert draw_from(torch.zeros(0, 5), torch.zeros(0, 3).double()).shape == (0, 3)


def test_numbers_depend_on_the_row_alone() -> None:
    assert (uniforms(7, 4, 3) == uniforms(7, 4, 3)).all()
    assert (uniforms(7, 9, 3)[:4] == uniforms(7, 4, 3)).all(), "also in a longer row"
    assert (uniforms(7, 4, 3) != uniforms(8, 4, 3)).all()
    assert uniforms(2**64 - 1, 1, 1).shape == (1, 1)
    many = uniforms(1, 100, 100)
    assert ((many >= 0) & (many < 1)).all()
    assert len(np.unique(many)) == 10_000
