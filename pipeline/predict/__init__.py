"""Using a student: classes for a folder of pictures, and an HTTP service."""
