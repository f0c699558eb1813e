"""Images: sources, splits, augmentations and batches on the device. Knows no model and no outside system."""
