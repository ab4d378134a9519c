"""Encoded images that are kept between requests, so that each click costs short answers of the decoder alone."""

from __future__ import annotations

from collections import OrderedDict

from pix2seq.errors import InputError
from pix2seq.tasks.request import EncodedImage


class NotKeptError(InputError):
    """An image is not kept, or not any more."""


class KeptImages:
    """Keep images by an id, as many as fit; those that were used last stay. For one thread."""

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images, self.max_bytes = max_images, max_bytes
        self.num_bytes = 0
        self._images: OrderedDict[str, EncodedImage] = OrderedDict()  # the last one was used last

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._images

    def add(self, image_id: str, image: EncodedImage) -> None:
        """Keep an image. Others leave until all fit; the new one stays, even if it does not fit alone."""
        if image_id in self._images:
            self.num_bytes -= num_bytes(self._images.pop(image_id))
        self._images[image_id] = image
        self.num_bytes += num_bytes(image)
        while len(self) > 1 and (len(self) > self.max_images or self.num_bytes > self.max_bytes):
            self.num_bytes -= num_bytes(self._images.popitem(last=False)[1])

    def get(self, image_id: str) -> EncodedImage:
        """Return an image, and count this as a use. Raises `NotKeptError`."""
        if image_id not in self._images:
            raise NotKeptError("the image is not kept, or not any more; send it to /images again")
        self._images.move_to_end(image_id)
        return self._images[image_id]


def num_bytes(image: EncodedImage) -> int:
    """Return the bytes that an encoded image holds."""
    return image.pixels.nbytes + sum(each.numel() * each.element_size() for each in (image.memory, *image.maps))
