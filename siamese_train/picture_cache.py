"""Decoded training pictures in memory, as many as fit."""

from __future__ import annotations

from multiprocessing.pool import ThreadPool

from PIL import Image
from tqdm import tqdm

from siamese_deploy.errors import ImageError
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.preprocess import decode_image
from siamese_deploy.providers import usable_cores


class PictureCache:
    """`picture(i)` decodes, or returns what `fill` has decoded before.

    Filled before worker processes are forked, so that they share its memory.
    """

    def __init__(self, folder: ImageFolder, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._decoded: dict[int, tuple[tuple[int, int], bytes]] = {}

    def __len__(self) -> int:
        """Number of pictures in memory."""
        return len(self._decoded)

    def picture(self, image: int) -> Image.Image:
        """Full-size RGB picture number `image` of the folder.

        Raises:
            ImageError: it cannot be read.
        """
        if image in self._decoded:
            size, pixels = self._decoded[image]
            return Image.frombytes("RGB", size, pixels)
        return decode_image(self.folder.absolute_path(image))

    def fill(self, *, show_progress: bool = False) -> None:
        """Decode pictures in the folder's order until `max_bytes` are full; those that cannot be read are left out."""
        if not self.max_bytes:
            return
        room = self.max_bytes
        with (
            interrupts_held() as let_interrupts_through,
            ThreadPool(usable_cores()) as threads,
            tqdm(total=len(self.folder), desc="decoding", unit="image", leave=False, disable=not show_progress) as bar,
        ):
            for image, decoded in enumerate(threads.imap(self._decode, range(len(self.folder)))):
                if decoded:
                    room -= len(decoded[1])
                    if room < 0:
                        break
                    self._decoded[image] = decoded
                bar.update()
                let_interrupts_through()

    def _decode(self, image: int) -> tuple[tuple[int, int], bytes] | None:
        try:
            picture = decode_image(self.folder.absolute_path(image))
        except ImageError:
            return None
        return picture.size, picture.tobytes()
