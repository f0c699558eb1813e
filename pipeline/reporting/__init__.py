"""What several steps report alike: statistics, tables, figures."""
