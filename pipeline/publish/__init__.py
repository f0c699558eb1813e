"""A student as a folder for others: card, weights, timm's configuration, ONNX; uploaded to a hub on request."""
