"""Comparison images and training curves."""

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from core.errors import UserError
from inference.comparison import LABEL_HEIGHT, MARGIN, comparison_frames, comparison_strip, labelled_row
from training import logs as curves


def test_rows_scale_images_to_one_height_and_keep_their_shape():
    images = [np.full((10, 20, 3), 7, np.uint8), np.full((40, 40, 3), 9, np.uint8)]
    row = labelled_row(images, ["a", "b"], height=30)
    assert row.shape == (30 + LABEL_HEIGHT + MARGIN, 60 + 30 + 2 * MARGIN, 3)
    assert (row[LABEL_HEIGHT : LABEL_HEIGHT + 30, :60] == 7).all()
    assert (row[LABEL_HEIGHT : LABEL_HEIGHT + 30, 60 + MARGIN : 90 + MARGIN] == 9).all()
    assert (row[:LABEL_HEIGHT, :60] < 128).any(), "the label is drawn"


def test_strip_shows_first_and_last_frame_and_still_images_repeat():
    clip = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    strip = comparison_strip({"still": clip[:1], "clip": clip}, rows=2, caption="8 x 8")
    strip, caption = strip[:-LABEL_HEIGHT], strip[-LABEL_HEIGHT:]
    assert (caption < 128).any(), "size and settings are told"
    middle = strip[LABEL_HEIGHT + 128 :: 256 + MARGIN][:, [128, 128 + 256 + MARGIN], 0]
    assert middle[0].tolist() == [10, 10] and strip[-128, 128 + 256 + MARGIN, 0] == 50
    assert len(list(comparison_frames({"still": clip[:1], "clip": clip}))) == 5


def test_curves_of_a_run(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run" / "logs"))
    for step in range(20):
        writer.add_scalar("loss", 1 / (step + 1), step)
    writer.close()
    steps, values, _ = curves.read_scalar(tmp_path / "run", "loss")
    assert steps.tolist() == list(range(20)) and np.allclose(values, 1 / (steps + 1))
    curves.main([f"runs=[{tmp_path / 'run'}]", f"output={tmp_path / 'c.png'}"])
    assert Image.open(tmp_path / "c.png").width > 300
    with pytest.raises(UserError, match="scalar=lost"):
        curves.main([f"runs=[{tmp_path / 'run'}]", "scalar=lost"])
    with pytest.raises(UserError, match="has no logs"):
        curves.main([f"runs=[{tmp_path}]"])
