"""What a sweep searches: dimensions, ranges, and what they change in a configuration."""
