"""Images: sources, splits, augmentations and batches on the device. Knows no model and no outside system."""

from pipeline.data.augmentations import CropFlip, Mix, MixKind, Normalize, crop_flip, draw_crop_flip, draw_mix, mix
from pipeline.data.batches import Batch, EpochDraws, EvalBatches, TrainBatches, batch_bounds, draw_epoch
from pipeline.data.sources import ImageData, load
from pipeline.data.splits import Split, split

__all__ = [
    "Batch",
    "CropFlip",
    "EpochDraws",
    "EvalBatches",
    "ImageData",
    "Mix",
    "MixKind",
    "Normalize",
    "Split",
    "TrainBatches",
    "batch_bounds",
    "crop_flip",
    "draw_crop_flip",
    "draw_epoch",
    "draw_mix",
    "load",
    "mix",
    "split",
]
