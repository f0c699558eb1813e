"""From a registered version to the champion, or not: the gate, the queue, the decision."""
