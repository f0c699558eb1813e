"""One file for each distillation method: its keys, with types, ranges and the sentences that `--help` prints."""
