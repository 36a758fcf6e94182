"""Random changes to full-size training pictures, as in the reference scripts: affine on black, then mirroring."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

MAX_ROTATION_DEGREES = 20.0
MAX_SHIFT = 0.2  # of width and height
SCALE = (0.8, 1.2)
MAX_SHEAR_DEGREES = 0.2  # along x; torchvision reads the reference's `shear=0.2` as degrees
MIRROR_PROBABILITY = 0.5


def augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A changed copy of an RGB image, of the same size.

    All chance comes from `random`, so a picture's change does not depend on which process loads it.
    """
    angle = random.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES)
    shift_x = round(random.uniform(-MAX_SHIFT, MAX_SHIFT) * image.width)
    shift_y = round(random.uniform(-MAX_SHIFT, MAX_SHIFT) * image.height)
    scale = random.uniform(*SCALE)
    shear = random.uniform(-MAX_SHEAR_DEGREES, MAX_SHEAR_DEGREES)
    changed: Image.Image = transforms.affine(
        image, angle, [shift_x, shift_y], scale, [shear, 0.0], interpolation=InterpolationMode.NEAREST, fill=[0, 0, 0]
    )
    return ImageOps.mirror(changed) if random.random() < MIRROR_PROBABILITY else changed
