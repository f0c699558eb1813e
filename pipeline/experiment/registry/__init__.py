"""The model registry: students registered by training, and the promotion that decides which of them is the champion."""
