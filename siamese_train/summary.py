"""What TensorBoard shows of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from siamese_deploy.evaluate import Evaluation
from siamese_deploy.pair_drawing import draw_pair
from siamese_train.config import TrainConfig

WORST_PAIRS_OF_A_KIND = 4


class Summary:
    """Writes events of completed epochs; steps count from 0, as the reference scripts' do."""

    def __init__(self, folder: Path, config: TrainConfig, first_epoch: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)
        settings = {name: value for name, value in config.to_json().items() if not name.endswith("_path")}
        # In this run's own file; SummaryWriter.add_hparams would start another one.
        metrics = {"val_loss": 0, "val_acc": 0, "val_roc_auc": 0}
        for event in hparams(settings, metrics):  # type: ignore[no-untyped-call]
            self._writer._get_file_writer().add_summary(event)  # type: ignore[no-untyped-call]

    def add(self, epoch: int, scalars: dict[str, float], evaluation: Evaluation, *, with_pictures: bool) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch)
        is_same = evaluation.pairs.is_same
        for name, of_kind in (("same", is_same), ("different", ~is_same)):
            if of_kind.any():
                self._writer.add_histogram(f"val_scores/{name}", evaluation.scores[of_kind], epoch)
        if with_pictures:
            self._writer.add_image("val_most_wrong_pairs", most_wrong_pairs(evaluation), epoch, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def most_wrong_pairs(evaluation: Evaluation) -> npt.NDArray[np.uint8]:
    """(H, W, 3) RGB: above, same pairs with the lowest scores; below, different pairs with the highest."""
    is_same, scores = evaluation.pairs.is_same, evaluation.scores
    order = np.argsort(scores, kind="stable")
    worst = [order[is_same[order]][:WORST_PAIRS_OF_A_KIND], order[~is_same[order]][::-1][:WORST_PAIRS_OF_A_KIND]]
    rows = [[draw_pair(evaluation, int(pair)) for pair in row] for row in worst if len(row)]
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (x * width, y * height))
    return np.asarray(grid)
