"""A student at work: classes for a folder of pictures, and an HTTP service."""
