"""Entry points: one thin file each, run as `python -m steps.<name>` or through MLproject."""
