"""ASIB: A-steps teach the fusion, B-steps the student (docs/method.md)."""
