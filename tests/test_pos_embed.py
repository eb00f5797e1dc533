"""Position embeddings: the reference's numbers, and rectangles."""

import pytest

from util.pos_embed import get_2d_sincos_pos_embed


def test_position_embedding_equals_the_reference():
    embedding = get_2d_sincos_pos_embed(48, 4, cls_token=True)
    assert embedding.shape == (17, 48)
    assert embedding.sum() == pytest.approx(390.9592524042382, rel=1e-12)
    assert abs(embedding).sum() == pytest.approx(413.4574817345996, rel=1e-12)
    assert embedding[5, :8].tolist() == [0.0] * 8  # second row, first column: columns come first
    assert embedding[6, :4].tolist() == pytest.approx(
        [0.8414709848078965, 0.4476708347189572, 0.21378066605529897, 0.09983341664682815]
    )


def test_position_embedding_of_a_rectangle_is_a_part_of_the_square_s():
    square = get_2d_sincos_pos_embed(16, 5).reshape(5, 5, 16)
    assert (get_2d_sincos_pos_embed(16, (3, 5)).reshape(3, 5, 16) == square[:3]).all()
