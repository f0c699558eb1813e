"""Pooling, unit length and attention of feature maps."""

import torch

from pipeline.training.methods.maps import attention, of_lesson, same_size, to_lesson, unit
from tests.pipeline.training.methods.feature_maps import maps, off, pool


def test_the_larger_map_is_pooled_along_each_side() -> None:
    a, b = maps(1, 2, 7, 3), maps(1, 4, 5, 6, seed=1)
    small_a, small_b = same_size(a, b)
    assert off(small_a[0], pool(a[0].tolist(), 5, 3)) < 1e-6
    assert off(small_b[0], pool(b[0].tolist(), 5, 3)) < 1e-6
    assert same_size(a, a)[0].data_ptr() == a.data_ptr(), "equal sizes are left as they are"


def test_rows_have_unit_length_at_any_scale_and_zeros_stay() -> None:
    x = torch.tensor([[3.0, 4.0], [3e30, 4e30], [-3e-9, 4e-9], [0.0, 0.0], [3e-20, 4e-20]], requires_grad=True)
    expected = [[0.6, 0.8], [0.6, 0.8], [-0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(unit(x), torch.tensor(expected), rtol=1e-6, atol=1e-12)
    unit(x)[:, 0].sum().backward()
    assert x.grad is not None
    # d(a / |x|)/dx = (b², −ab) / |x|³; a row that counts as zero passes the gradient on
    gradient = [[0.128, -0.096], [0.128e-30, -0.096e-30], [0.128e9, 0.096e9], [1.0, 0.0], [1.0, 0.0]]
    torch.testing.assert_close(x.grad, torch.tensor(gradient), rtol=1e-5, atol=0)


def test_attention_is_where_any_channel_is_active() -> None:
    x = torch.zeros(1, 2, 2, 2)
    x[0, 0, 0, 1], x[0, 1, 1, 0] = 2.0, -1.0
    assert attention(x, 2)[0].tolist() == [0.0, *torch.tensor([4.0, 1.0]).div(17**0.5).tolist(), 0.0]
    assert attention(x, 1)[0].tolist() == [0.0, *torch.tensor([2.0, 1.0]).div(5**0.5).tolist(), 0.0]


def test_a_lesson_gives_its_maps_back_in_order() -> None:
    given = [maps(2, 3, 2, 2, seed=i) for i in range(5)]
    assert all(a is b for a, b in zip(of_lesson(to_lesson(given) | {"other": given[0]}), given, strict=True))
