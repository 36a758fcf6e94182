"""Random changes to full-size training pictures, as in the reference scripts: affine, then mirroring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from siamese_train.config import FILL_COLOURS, TrainConfig

MIRROR_PROBABILITY = 0.5


@dataclass(frozen=True)
class Augmentation:
    """The defaults are the reference scripts' limits."""

    rotate: float = 20.0
    """Degrees."""
    shift: float = 0.2
    """Share of width and height."""
    scale: float = 0.2
    """Largest change of the factor 1."""
    shear: float = 0.2
    """Degrees along x; torchvision reads the reference's `shear=0.2` so."""
    flip: bool = True
    fill: str = "black"
    """What comes in at the borders: black, white, border or R,G,B."""

    @classmethod
    def of(cls, config: TrainConfig) -> Augmentation:
        strength = config.augment
        return cls(
            rotate=strength * config.rotate,
            shift=strength * config.shift,
            scale=min(0.9, strength * config.scale),
            shear=min(80.0, strength * config.shear),
            flip=not config.no_flip,
            fill=config.fill,
        )

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """A changed copy of an RGB image, of the same size.

        All chance comes from `random`, so a picture's change does not depend on which process loads it.
        """
        if self.rotate or self.shift or self.scale or self.shear:
            angle = random.uniform(-self.rotate, self.rotate)
            shift_x = round(random.uniform(-self.shift, self.shift) * image.width)
            shift_y = round(random.uniform(-self.shift, self.shift) * image.height)
            scale = 1 + random.uniform(-self.scale, self.scale)
            shear = random.uniform(-self.shear, self.shear)
            fill = self._fill_colour(image)
            image = transforms.affine(
                image,
                angle,
                [shift_x, shift_y],
                scale,
                [shear, 0.0],
                interpolation=InterpolationMode.NEAREST,
                fill=fill,
            )
        return ImageOps.mirror(image) if self.flip and random.random() < MIRROR_PROBABILITY else image

    def _fill_colour(self, image: Image.Image) -> list[int]:
        if self.fill == "border":
            return border_colour(image)
        return list(FILL_COLOURS.get(self.fill) or map(int, self.fill.split(",")))


def border_colour(image: Image.Image) -> list[int]:
    """Median of an RGB image's outermost pixels, channel by channel."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return [int(level) for level in np.median(border, axis=0)]
