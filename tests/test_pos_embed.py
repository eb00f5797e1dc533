"""Position embeddings: the reference's numbers, and rectangles."""

import pytest
import torch

from model_vit import vit_nano_patch4
from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed


def test_position_embedding_equals_the_reference():
    embedding = get_2d_sincos_pos_embed(48, 4, cls_token=True)
    assert embedding.shape == (17, 48)
    assert embedding.sum() == pytest.approx(390.9592524042382, rel=1e-12)
    assert abs(embedding).sum() == pytest.approx(413.4574817345996, rel=1e-12)
    assert embedding[5, :8].tolist() == [0.0] * 8  # second row, first column: columns come first
    assert embedding[6, :4].tolist() == pytest.approx(
        [0.8414709848078965, 0.4476708347189572, 0.21378066605529897, 0.09983341664682815]
    )


def test_positions_of_another_shape_with_as_many_patches_are_resized():
    """A column's values stay its own where rows are made: interpolation does not mix the two."""
    model = vit_nano_patch4(img_size=32)  # 8 x 8
    columns = torch.arange(16.0).repeat(4)[:, None].expand(-1, 96)  # of 4 x 16, row by row
    weights = {"pos_embed": torch.cat([torch.full((1, 96), -5.0), columns])[None]}
    interpolate_pos_embed(model, weights, (4, 16))
    found = weights["pos_embed"][0]
    assert (found[0] == -5).all()
    grid = found[1:].reshape(8, 8, 96)
    torch.testing.assert_close(grid, grid[:1].expand(8, -1, -1))
    inner = 2 * torch.arange(1.0, 7)[:, None].expand(-1, 96) + 0.5  # halfway between two columns
    torch.testing.assert_close(grid[0, 1:7], inner)


def test_position_embedding_of_a_rectangle_is_a_part_of_the_square_s():
    square = get_2d_sincos_pos_embed(16, 5).reshape(5, 5, 16)
    assert (get_2d_sincos_pos_embed(16, (3, 5)).reshape(3, 5, 16) == square[:3]).all()
