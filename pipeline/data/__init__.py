"""Images: sources, splits, augmentations and batches on the device. Independent of models and outside systems."""
