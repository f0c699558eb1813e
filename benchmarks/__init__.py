"""Speed measurements; results/ holds the numbers with the machine and the versions they were taken on."""
