"""ASIB's settings (docs/method.md sections 1 to 4), and the rules between them."""
