"""An evaluation in the style of the research scripts, the baseline of whole.py: one pair after the other, batch 1, both
pictures through the backbone for every pair, gradients recorded, a matplotlib figure per pair that is never closed.

    python reference_style.py --val_path DIR --out_path DIR --checkpoint FILE [--images none] [--theirs]

Written anew. What differs from the scripts: the pair list is `sample_pairs`' (theirs depends on the hash seed), scores
are written to scores.csv, and pictures are resized by Pillow before they become tensors, so that the scores can be
compared with ours; --theirs resizes the normalised tensor, as the scripts do. Its time was compared with theirs:
README.md, whole.py.
"""

from __future__ import annotations

import csv
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms

from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.pairs import sample_pairs
from siamese_train.checkpoint import read_checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PairsOneByOne(IterableDataset):
    def __init__(self, val_path: Path, size: int, theirs: bool) -> None:
        self.folder = scan_image_folder(val_path)
        self.pairs = sample_pairs(self.folder, 1)
        steps = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        if theirs:
            steps.append(transforms.Resize((size, size)))
        else:
            steps.insert(0, transforms.Resize((size, size)))
        self.transform = transforms.Compose(steps)

    def __iter__(self):
        sides = zip(self.pairs.left.tolist(), self.pairs.right.tolist(), self.pairs.is_same.tolist(), strict=True)
        for left, right, is_same in sides:
            images = [
                self.transform(Image.open(self.folder.absolute_path(k)).convert("RGB")).float() for k in (left, right)
            ]
            names = self.folder.class_name(left), self.folder.class_name(right)
            yield images, torch.FloatTensor([is_same]), names

    def __len__(self) -> int:
        return len(self.pairs)


@click.command()
@click.option("--val_path", "-v", type=Path, required=True)
@click.option("--out_path", "-o", type=Path, required=True)
@click.option("--checkpoint", "-c", type=Path, required=True)
@click.option("--images", type=click.Choice(["all", "none"]), default="all")
@click.option("--theirs", is_flag=True, help="Resize as the scripts do; scores then differ from ours.")
def main(val_path: Path, out_path: Path, checkpoint: Path, images: str, theirs: bool) -> None:
    out_path.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved = read_checkpoint(checkpoint)
    network = saved.build_model().to(device).eval()
    loader = DataLoader(PairsOneByOne(val_path, saved.image_size, theirs), batch_size=1)
    criterion = torch.nn.BCELoss()
    undo = transforms.Compose(
        [
            transforms.Normalize((0.0, 0.0, 0.0), [1 / s for s in STD]),
            transforms.Normalize([-m for m in MEAN], (1.0, 1.0, 1.0)),
        ]
    )
    losses, right, scores = [], 0, []
    for number, ((one, other), is_same, names) in enumerate(loader):
        print(f"{number} of {len(loader)}")
        one, other, is_same = one.to(device), other.to(device), is_same.to(device)
        score = network(one, other)
        losses.append(criterion(score, is_same).item())
        right += torch.count_nonzero(is_same == (score > 0.5)).item()
        scores.append(score.item())
        if images == "all":
            figure = plt.figure(f"{names[0][0]} {names[1][0]}", figsize=(4, 2))
            plt.suptitle(f"{names[0][0]}  {score.item():.2f}  {names[1][0]}")
            for place, image in enumerate((one, other), start=1):
                figure.add_subplot(1, 2, place)
                plt.imshow(undo(image).cpu().numpy()[0][0], cmap=plt.cm.gray)
                plt.axis("off")
            plt.savefig(out_path / f"{number}.png")
    print(f"loss {sum(losses) / len(losses):.4f}  accuracy {right / len(losses):.4f}")
    with open(out_path / "scores.csv", "w", newline="") as file:
        csv.writer(file).writerows([[f"{score:.9g}"] for score in scores])


if __name__ == "__main__":
    main()
