"""From a decoded image to a teacher's input: each teacher has its own size, mean and std."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from stages.data.view import Box, Resample, View, cut_view, whole_image_box
from stages.extract.geometry import InputFrame

_PROBE_SIZE = (61, 83)  # rows, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Resize without cropping, scale to 0..1, subtract `mean`, divide by `std`, pad with zeros.

    Images are resized by torch on bytes, antialiased, six to ten times as fast as by Pillow, whose
    pixels it gives to within two steps of 255, most to the bit (docs/results/extraction.md).

    Letters: `h w` pixels of the frame's content, `H W` pixels of the whole frame.
    """

    frame: InputFrame
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Resample

    def __call__(
        self, image: UInt8[np.ndarray, "rows columns 3"], box: Box
    ) -> UInt8[Tensor, "h w 3"]:
        """Return the pixels that fill the frame's content: the part `box` of an RGB image."""
        cut = torch.from_numpy(np.array(cut_view(image, View(box=box)), order="C"))
        if cut.shape[:2] == self.frame.content:
            return cut
        channels_last = cut[None].permute(
            0, 3, 1, 2
        )  # as one image, which torch has a fast way for
        resized = interpolate(
            channels_last, self.frame.content, mode=self.interpolation, antialias=True
        )
        return resized[0].permute(1, 2, 0).contiguous()

    @property
    def kind(self) -> tuple[object, ...]:
        """What the pixels depend on: those of two teachers are the same where this is."""
        return self.frame.content, self.interpolation

    def normalise(
        self,
        images: UInt8[Tensor, "B h w 3"],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Float32[Tensor, "B 3 H W"]:
        """Return the network's input, computed on the device that the pixels are on.

        Padding is zero after normalisation, that is the teacher's mean colour, as SAM does it.
        Bytes cross to the device, a quarter of what float32 would take.
        """
        device, (height, width) = images.device, self.frame.content
        # Tensors on the device: CUDA divides by a number of Python's as by its rounded reciprocal.
        # Whole lines of pixels: three channels at a time fill no vector of a processor.
        largest, mean, std = (
            torch.tensor(values, device=device).repeat(width)
            for values in ((255.0,) * 3, self.mean, self.std)
        )
        lines = images.flatten(2).float().div_(largest).sub_(mean).div_(std)
        content = lines.view(images.shape).permute(0, 3, 1, 2)
        if self.frame.size == self.frame.content:
            return content.contiguous(memory_format=memory_format)
        padded = torch.empty(
            (len(images), 3, *self.frame.size), device=device, memory_format=memory_format
        ).zero_()
        padded[:, :, :height, :width] = content
        return padded


def probe_image() -> UInt8[np.ndarray, "61 83 3"]:
    """Return the fixed image whose preprocessed form is hashed: gradients over a checkerboard."""
    rows, columns = np.indices(_PROBE_SIZE)
    checker = (rows // 7 + columns // 5) % 2 * 96
    channels = (rows * 159 // 60 + checker, columns * 159 // 82 + checker, 255 - 2 * rows - columns)
    return np.stack(channels, axis=-1).astype(np.uint8)


def probe_box(view: tuple[int, int]) -> Box:
    """Return the part of the probe image that a view of this shape (height, width) shows."""
    return whole_image_box(*_PROBE_SIZE, view)


def probe_digest(preprocessing: Preprocessing, view: tuple[int, int]) -> str:
    """Return a SHA-256 in hexadecimal of what the probe image becomes, to 4 decimals.

    It changes with whatever changes the result (a library's resize, a mean, our own code), and so
    catches what a list of settings would miss.
    """
    result = preprocessing.normalise(preprocessing(probe_image(), probe_box(view))[None])[0]
    rounded = np.round(result.numpy().astype(np.float64), 4) + 0.0  # no negative zeros
    head = repr(rounded.shape).encode()
    return hashlib.sha256(head + rounded.astype("<f4").tobytes()).hexdigest()
