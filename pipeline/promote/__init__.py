"""Whether a registered version becomes the champion: the gate, the queue, the decision."""
