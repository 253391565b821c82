"""Fields of records as tensors of a batch."""

import numpy as np
import torch

from loader.delivery.arrays import stacked_boxes


def boxes_of(words):
    corners = np.arange(4.0 * words).reshape(words, 4)
    return {"word": np.arange(words), "crop": np.arange(words) + 5, "corners": corners}


def test_boxes_are_padded_to_the_row_with_most():
    rows = [boxes_of(2), None, boxes_of(3)]
    found = stacked_boxes([{"record": {"ocr_boxes": each}} for each in rows])
    assert found["boxes"].dtype == torch.float32
    assert found["boxes"].shape == (3, 3, 4)
    assert found["boxes"][2].tolist() == rows[2]["corners"].tolist()
    assert found["boxes"][0, 2].tolist() == [0, 0, 0, 0]
    assert found["box_crop"].tolist() == [[5, 6, -1], [-1, -1, -1], [5, 6, 7]]
    assert found["box_word"].tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    assert stacked_boxes([{"record": {}}])["boxes"].shape == (1, 0, 4)
