"""The release's two transforms."""

from typing import Any

from PIL import Image

from utils.seeds import derive_seed


class Transforms:
    """The release's two transforms, PIL image -> uint8 ``(3, size, size)``; no mean/std normalisation.

    Args:
        size: side of the square that the backbone sees.
        augment_seed: where the views' random numbers come from.
    """

    def __init__(self, size: int, augment_seed: int) -> None:
        from torchvision import transforms as T
        from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

        self.augment_seed = augment_seed
        self.test = T.Compose(
            [T.Resize(int(256 / 224 * size), InterpolationMode.BICUBIC), T.CenterCrop(size), pil_to_tensor]
        )
        self.train = T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3)),
                T.RandomHorizontalFlip(0.5),
                pil_to_tensor,
            ]
        )

    def view(self, image: Image.Image, key: str, view: int) -> Any:
        """View ``view`` of the image named ``key``: its random numbers depend on seed, view and key alone."""
        import torch

        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(derive_seed("view", self.augment_seed, view, key))
            return self.train(image)
